"""What this machine is, which techniques and backends run on it, what is missing and how to get it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from accelerando.machine import Machine, installed_version
from accelerando.plugins import KINDS, discover

# import name -> what pip calls it, where they differ
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
TOOLS = {"g++": "builds the `inductor` backend's packages: apt-get install g++, or your system's C++ compiler"}
OPTIONAL = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "sklearn",
    "pandas",
    "plotly",
    "cloudpickle",
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked for: what it is, whether it is there, and its version or how to get it."""

    name: str
    good: bool
    detail: str


def checks(machine: Machine) -> Iterator[Check]:
    """Every package, tool and plugin, found or missing.  Imports nothing heavy."""
    for name in OPTIONAL:
        package = DISTRIBUTIONS.get(name, name)
        version = installed_version(package)
        yield Check(
            name, version is not None, version or f"pip install {package}  (or: pip install 'accelerando[optimize]')"
        )
    for tool, use in TOOLS.items():
        yield Check(tool, shutil.which(tool) is not None, shutil.which(tool) or use)
    for kind in KINDS:
        for name, plugin in discover(kind).items():
            missing = plugin.missing()
            detail = f"needs {', '.join(missing)}" if missing else "ready"
            yield Check(f"{kind[:-1]} {name}", not missing, detail)
    for what, native in (("int8", machine.int8), ("bf16", machine.bf16), ("fp16", machine.fp16)):
        yield Check(what, native, "native here" if native else "not native here: slower or not offered")


def show(console: Console | None = None) -> None:
    """Print the machine and the checks."""
    console = console or Console(highlight=False)
    machine = Machine.look()
    console.print(str(machine), markup=False)
    console.print(f"{machine.system}, Python {machine.python}", markup=False)
    if machine.accelerators:
        console.print(f"accelerators seen, not used by this release: {', '.join(machine.accelerators)}", markup=False)
    table = Table(box=None, show_header=False, padding=(0, 1))
    for check in checks(machine):
        mark = "[green]ok[/]" if check.good else "[yellow]--[/]"
        table.add_row(mark, check.name, check.detail.replace("[", r"\["))
    console.print(table)
