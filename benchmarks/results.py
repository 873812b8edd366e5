"""benchmarks/results.md: one section for each benchmark, replaced when it is run again."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from accelerando.machine import Machine

FILE = Path(__file__).parent / "results.md"
HEAD = """# Results

Every figure here was printed by `scripts/bench NAME` on the machine named in its section; intervals are 95 %.
Ratios come from rounds in which all contestants take turns, so they hold on a machine that others use too; absolute
times are for orientation only.
"""


def record(name: str, title: str, body: str) -> None:
    """Put a section into results.md, and print it."""
    machine = Machine.look()
    versions = ", ".join(f"{k} {v}" for k, v in machine.versions if k != "accelerando")
    text = f"## {title}\n\n`scripts/bench {name}`, {date.today()}, on {machine}; {versions}\n\n{body.strip()}\n"
    sections = _sections()
    sections[name] = text
    marked = [f"<!-- {key} -->\n{value.strip()}\n" for key, value in sections.items()]
    FILE.write_text(HEAD + "\n" + "\n".join(marked), encoding="utf-8")
    print(text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _sections() -> dict[str, str]:
    if not FILE.exists():
        return {}
    parts = re.split(r"<!-- ([\w-]+) -->\n", FILE.read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))
