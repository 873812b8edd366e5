"""What importing costs, in fresh processes, and what comes along."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from accelerando.interval import median_interval
from benchmarks.overhead import tiny_bundle
from benchmarks.results import record, table

HEAVY = ("torch", "onnx", "openvino", "nncf", "sklearn", "pandas", "plotly")
RUNS = 15
CODE = """
import json, sys, time
start = time.perf_counter()
{statement}
taken = time.perf_counter() - start
print(json.dumps([taken, [m for m in {heavy!r} if m in sys.modules]]))
"""


def fresh(statement: str) -> tuple[float, list[str]]:
    code = CODE.format(statement=statement, heavy=HEAVY)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, along = json.loads(told.splitlines()[-1])
    return seconds, along


def run(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny_bundle(Path(folder))
        bundle = str(Path(folder) / "bundle")
        rows = []
        for what, statement in (
            ("`import accelerando`", "import accelerando"),
            ("`accelerando.load(...)` of an ONNX bundle", f"import accelerando; accelerando.load({bundle!r})"),
        ):
            taken = [fresh(statement) for _ in range(RUNS)]
            seconds = median_interval(np.array([t for t, _ in taken]))
            along = sorted({m for _, more in taken for m in more})
            figure = f"{seconds.mid * 1e3:.0f} ms ({seconds.low * 1e3:.0f} to {seconds.high * 1e3:.0f})"
            rows.append([what, figure, ", ".join(along) or "none of " + ", ".join(HEAVY)])
    record(name, "Imports", table(["what", "time in a fresh process", "heavy libraries that came along"], rows))
