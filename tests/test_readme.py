"""The documentation is true: its code runs, commands and links exist, figures were measured, the map is whole."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from accelerando import plugins
from accelerando.cli import app
from accelerando.errors import Reason

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "accelerando"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COMMANDS: Any = typer.main.get_command(app)
FIGURE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?(x|\u00d7|%|times|points?|ns|us|\u00b5s|ms|s|kB|MB|GB|MiB|GiB)(?!\w)")
SHELL_WORDS = ("|", "&&", ">", ">>")


def of(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda p: p.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """(title or nothing, text) of every fenced block of a language, in order."""
    found = re.findall(rf"^```{language}(?: title=\"([^\"]+)\")?\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [(title, text) for title, text in found]


# --- code -------------------------------------------------------------------------------------------------------

# What makes a page small enough for a test: few and short rounds, and little training.
SHORT = """
from dataclasses import replace
from accelerando.measure import bench
from accelerando.search import certificate, grounds
bench.SCREEN = replace(bench.SCREEN, block_seconds=0.02)
grounds.SELECT = replace(grounds.SELECT, least=8, most=8, block_seconds=0.02)
certificate.CERTIFY = replace(certificate.CERTIFY, least=12, most=12, block_seconds=0.02)
"""
TINY = {
    "README.md": "import accelerando.demo\naccelerando.demo.train.__defaults__ = (1,)  # epochs\n",
    "docs/tutorial.md": "",
}
# The README loads its bundle without the model, so it needs a rung that does without; where the machine is so busy
# that the first budget proved none, the second goes on from it.
BUDGETS = {"README.md": ("30s", "90s"), "docs/tutorial.md": ("16s",)}


@pytest.mark.slow
@of([ROOT / name for name in TINY])
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    code = SHORT + TINY[name] + "\n".join(text for _, text in blocks(page, "python"))
    assert re.search(r'budget="[^"]+"', code)
    for budget in BUDGETS[name]:
        (tmp_path / "page.py").write_text(re.sub(r'budget="[^"]+"', f'budget="{budget}"', code))
        done = subprocess.run(
            [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        if "[no-rung]" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert "The ladder" in done.stdout
    assert next(tmp_path.glob("*/manifest.json")).is_file()


def example(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that a how-to shows as its first file."""
    title, text = blocks(ROOT / "docs/how-to" / page, "python")[0]
    (folder / title).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delitem(sys.modules, title.removesuffix(".py"), raising=False)
    return importlib.import_module(title.removesuffix(".py"))


@pytest.mark.parametrize(("page", "kind"), [("add-a-technique.md", "techniques"), ("add-a-backend.md", "backends")])
def test_the_examples_of_plugins_are_taken_as_plugins(
    page: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example(page, tmp_path, monkeypatch)
    assert issubclass(plugins._class_of(module.__name__, kind), plugins.KINDS[kind])


@pytest.mark.slow
def test_the_example_of_a_technique_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerando.testing import technique_contract as contract

    module = example("add-a-technique.md", tmp_path, monkeypatch)
    (tmp_path / "work").mkdir()
    subject = contract.prepare(module.RoundWeights, tmp_path / "work")
    for check in contract.CHECKS:
        check(subject)


@pytest.mark.slow
def test_the_example_of_a_backend_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerando.testing import backend_contract as contract

    module = example("add-a-backend.md", tmp_path, monkeypatch)
    (tmp_path / "work").mkdir()
    subject = contract.prepare(module.PlainRuntime, "image", tmp_path / "work")
    for check in contract.CHECKS:
        check(subject)


@of([p for p in PAGES if blocks(p, "python")])
def test_every_block_of_python_parses_and_names_what_is_there(page: Path) -> None:
    for _, text in blocks(page, "python"):
        compile(text, page.name, "exec")
        for module, names in re.findall(r"^from (accelerando[\w.]*) import ([\w, ]+?)(?: as \w+)?$", text, re.M):
            for name in names.split(", "):
                try:
                    found = getattr(importlib.import_module(module), name, None)
                    assert found or importlib.import_module(f"{module}.{name}")
                except ImportError:
                    pytest.fail(f"{page.name}: there is no {name} in {module}")


# --- commands ---------------------------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    for _, text in blocks(page, "sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            end = next((i for i, w in enumerate(words) if w in SHELL_WORDS), len(words))
            if words:
                yield words[:end]


def complaint(words: list[str]) -> str:
    """What is wrong with a command line, or nothing."""
    program, *arguments = words
    if program == "accelerando":
        name = arguments[0] if arguments else ""
        if name not in COMMANDS.commands:
            return f"there is no command {name!r}"
        try:
            COMMANDS.commands[name].make_context(name, arguments[1:])
        except Exception as error:  # noqa: BLE001  typer's own, whose place differs between its versions
            return f"{type(error).__name__}: {error}"
    elif program == "pip":
        extras = metadata.metadata("accelerando").get_all("Provides-Extra") or []
        good = re.fullmatch(r"accelerando(?:\[(\w+)\])?", arguments[-1])
        if arguments[0] != "install" or not good or (good[1] and good[1] not in extras):
            return f"pip can't {' '.join(arguments)}"
    elif program.startswith(("scripts/", ".ci/")):
        script = ROOT / program
        if not script.is_file() or not os.access(script, os.X_OK):
            return f"{program} is not there, or can't be run"
        if missing := [a for a in arguments if a.startswith("--") and a not in script.read_text()]:
            return f"{program} knows no {missing[0]}"
    else:
        return f"nobody knows {program!r}"
    return ""


@of([p for p in PAGES if blocks(p, "sh")])
def test_every_command_exists_and_takes_its_options(page: Path) -> None:
    said = [f"{shlex.join(words)}: {wrong}" for words in commands(page) if (wrong := complaint(words))]
    assert not said, "\n".join(said)


@pytest.mark.parametrize(
    "line",
    ["accelerando optimise m.onnx", "accelerando optimize m.onnx --data d.npz --gaol x", "accelerando report a b",
     "accelerando optimize m.onnx", "scripts/nothing", "scripts/test --none", "pip install 'accelerando[fast]'",
     "rm x"],
)  # fmt: skip
def test_sabotage_a_command_that_does_not_exist_is_named(line: str) -> None:
    assert complaint(shlex.split(line))


@pytest.mark.parametrize("name", ["", *sorted(COMMANDS.commands)])
def test_help_works_for_every_command(name: str) -> None:
    done = CliRunner().invoke(app, [*name.split(), "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage" in done.output


def test_the_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands(ROOT / "README.md") if words[0] == "accelerando"}
    assert shown == set(COMMANDS.commands)


# --- links ------------------------------------------------------------------------------------------------------


def dead_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = [a or b for a, b in re.findall(r"\]\(([^)#\s]+)[^)]*\)|^\[[^\]]+\]: (\S+)", text, re.M)]
    here = [link for link in links if not re.match(r"https?://|mailto:", link)]
    return [link for link in here if not (page.parent / link).exists()]


@of(PAGES)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_sabotage_a_dead_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](page.md) and [b](nothing.md#part)\n```\n[c](code.md)\n```\n")
    assert dead_links(tmp_path / "page.md") == ["nothing.md"]


# --- figures ----------------------------------------------------------------------------------------------------


def marked(text: str) -> dict[str, str]:
    """What stands in the places that are marked as the output of a run, by the mark's name."""
    return dict(re.findall(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", text, re.S))


def unfounded_figures(text: str, results: str) -> list[str]:
    """Figures with a unit that nobody measured: not in a marked place, not in code, not in the results.

    What says a goal in words may repeat the numbers of the goal on its line.
    """
    text = re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    measured = {number + unit for number, unit in FIGURE.findall(results)}
    found = []
    for line in text.splitlines():
        asked = " ".join(re.findall(r"`[^`]+`", line))
        for number, unit in FIGURE.findall(re.sub(r"`[^`]+`", "", line)):
            if number + unit not in measured and not re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", asked):
                found.append(number + unit)
    return found


def test_the_figures_of_the_readme_were_measured() -> None:
    results = ROOT / "benchmarks" / "results.md"
    text = (ROOT / "README.md").read_text()
    assert unfounded_figures(text, results.read_text() if results.exists() else "") == []


def test_sabotage_a_figure_that_nobody_measured_is_found() -> None:
    text = "It is 7.5x faster at 12 ms.\n<!-- run -->\n9.9x\n<!-- /run -->\n`drop <= 1%`: 1 % lost, 2 % not."
    assert unfounded_figures(text, "12 ms") == ["7.5x", "2%"]


@of([ROOT / "README.md", ROOT / "docs/tutorial.md"])
def test_marked_figures_name_their_machine(page: Path) -> None:
    places = marked(page.read_text())
    assert places
    for name, text in places.items():
        assert not FIGURE.search(text) or "cores" in text, f"{name} has figures, but does not say of which machine"


# --- what must be whole -----------------------------------------------------------------------------------------


def test_the_map_has_a_line_for_every_file_and_none_for_others() -> None:
    rooms: dict[str, set[str]] = {}
    for part in re.split(r"^## ", (ROOT / "docs/map.md").read_text(), flags=re.M)[1:]:
        room = re.match(r"`(\w+)/`|The root", part)
        if room:
            rooms[room[1] or "."] = set(re.findall(r"^\| `([\w.]+\.py)`", part, re.M))
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert rooms.keys() == {".", *folders}
    for name, lines in rooms.items():
        there = {p.name for p in (SOURCE / name).glob("*.py")} - (set() if name == "." else {"__init__.py"})
        assert there - lines == set(), f"{name}: without a line in docs/map.md"
        assert lines - there == set(), f"{name}: a line in docs/map.md, but no file"


def test_the_reasons_are_those_of_the_code() -> None:
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (.+?) \| (.+?) \|$", (ROOT / "docs/how-to/read-the-report.md").read_text(), re.M
    )
    assert [row[0] for row in rows] == [r.name for r in Reason]
    for name, happened, remedy in rows:
        reason = Reason[name]
        assert happened.startswith(reason.happened), name
        assert remedy.replace("; `accelerando doctor` prints the line", "")[:7] == reason.remedy[:7], name


def test_the_decisions_are_numbered_and_listed() -> None:
    folder = ROOT / "docs/decisions"
    pages = sorted(p.name for p in folder.glob("0*.md"))
    assert [name[:4] for name in pages] == [f"{i:04}" for i in range(1, len(pages) + 1)]
    for name in pages:
        assert name in (folder / "index.md").read_text()
        assert name in (ROOT / "mkdocs.yml").read_text()
        text = (folder / name).read_text()
        assert [h in text for h in ("## Context", "## Decision", "## Consequences")] == [True] * 3, name
