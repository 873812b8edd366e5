"""Requests per second of a tiny model over HTTP: our server against handlers around the same session.

Each server has one core to itself (all its processes), and the load generator, wrk, the other.  They take turns, round
by round.  Others' packages are installed into a venv of their own each, in the cache; one that can't be is named.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accelerando.interval import median_interval
from benchmarks.overhead import tiny_bundle
from benchmarks.results import record, table

HERE = Path(__file__).parent / "handlers"
CACHE = Path(os.environ.get("ACCELERANDO_BENCH_FOLDER", str(Path.home() / ".cache" / "accelerando-benchmarks")))
ROUNDS, SECONDS, CONNECTIONS = 7, 4, 16
ASKED_RATE, ASKED_RATIO = 2000.0, 1.5
ROW = [[1.0] * 64]
PLAIN = json.dumps({"data": ROW})
OURS = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": ROW[0]}]})
PACKAGES = {"FastAPI": ("fastapi", "uvicorn[standard]"), "LitServe": ("litserve",), "BentoML": ("bentoml",)}


@dataclass(frozen=True)
class Contestant:
    """A server: how it is started, where it is asked, and with what."""

    name: str
    command: tuple[str, ...]
    port: int
    path: str
    body: str


def run(name: str) -> None:
    if missing := [tool for tool in ("wrk", "taskset") if not shutil.which(tool)]:
        sys.exit(f"{', '.join(missing)} is needed: apt-get install wrk util-linux")
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_bundle(Path(folder))
        os.environ["TINY_MODEL"] = str(model)
        found, absent = contestants(Path(folder) / "bundle", model)
        rates = contest(found, Path(folder))
    ours = np.array(rates[found[0].name])
    lines, best = [], 0.0
    for one in found:
        theirs = np.array(rates[one.name])
        ratio = median_interval(ours / theirs)
        if not one.name.startswith("accelerando"):
            best = max(best, float(np.median(theirs)))
        lines.append([one.name, f"{np.median(theirs):,.0f}", f"{ratio.mid:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"])
    over = float(np.median(ours)) / best if best else float("nan")
    good = np.median(ours) >= ASKED_RATE and over >= ASKED_RATIO
    body = table(["server", "requests/s, one core", "ours over it"], lines)
    body += (
        f"\n\n{CONNECTIONS} connections, a row of 64 numbers as JSON, {ROUNDS} rounds of {SECONDS} s in turns. Asked "
        f"for: at least {ASKED_RATE:,.0f}/s and {ASKED_RATIO} times the best of the others; ours has "
        f"{np.median(ours):,.0f}/s and {over:.2f} times, {'reached' if good else 'not reached'}."
    )
    if absent:
        body += f" Not there, for they could not be installed: {', '.join(absent)}."
    record(name, "Requests per second of a tiny model over HTTP", body)


def contestants(bundle: Path, model: Path) -> tuple[list[Contestant], list[str]]:
    """Ours, in this process and apart, and everybody else who can be installed; and who can't."""
    serve = (sys.executable, "-c", "from accelerando.cli import main; main()", "serve", f"tiny={bundle}")
    common = ("--grpc-port", "-1", "--goal", "p99 <= 10s", "--no-watch")
    path = "/v2/models/tiny/infer"
    found = [
        Contestant("accelerando, --no-isolate", (*serve, *common, "--no-isolate", "--port", "8810"), 8810, path, OURS),
        Contestant("accelerando", (*serve, *common, "--port", "8811"), 8811, path, OURS),
    ]
    absent = []
    for port, (name, packages) in enumerate(PACKAGES.items(), 8812):
        python = installed(name, packages)
        if python is None:
            absent.append(name)
            continue
        command: tuple[str, ...] = (str(python), str(HERE / f"{name.lower()}_handler.py"), str(model), str(port))
        if name == "BentoML":
            command = (
                str(python.parent / "bentoml"), "serve", "bentoml_handler:Tiny", "--working-dir", str(HERE), "--port",
                str(port),
            )  # fmt: skip
        found.append(Contestant(name, command, port, "/infer", PLAIN))
    return found, absent


def installed(name: str, packages: Sequence[str]) -> Path | None:
    """The Python of a venv that has these packages; None where they can't be had."""
    venv = CACHE / f"venv-{name.lower()}"
    python = venv / "bin" / "python"
    if (venv / "whole").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", *packages, "onnxruntime", "numpy"]
    if subprocess.run(pip).returncode != 0:
        return None
    (venv / "whole").touch()
    return python


def contest(found: Sequence[Contestant], folder: Path) -> dict[str, list[float]]:
    """Requests per second, round by round."""
    servers = [
        subprocess.Popen(["taskset", "-c", "0", *c.command], stdout=subprocess.DEVNULL, start_new_session=True)
        for c in found
    ]
    try:
        for one in found:
            wait_for(one)
        rates: dict[str, list[float]] = {one.name: [] for one in found}
        order = np.random.default_rng(0)
        for _ in range(ROUNDS):
            for i in order.permutation(len(found)):
                rates[found[i].name].append(hammer(found[i], folder))
        return rates
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(30)
            with contextlib.suppress(ProcessLookupError):  # some leave their workers behind, which poll
                os.killpg(server.pid, signal.SIGKILL)


def wait_for(one: Contestant) -> None:
    """Until it answers rightly."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{one.port}{one.path}", one.body.encode(), {"content-type": "application/json"}
    )
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                json.load(reply)
                return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"{one.name} did not answer within two minutes")


def hammer(one: Contestant, folder: Path) -> float:
    """Requests per second for some seconds; every answer must be a good one."""
    script = folder / "post.lua"
    script.write_text(
        f"wrk.method = 'POST'\nwrk.body = [==[{one.body}]==]\nwrk.headers['content-type'] = 'application/json'\n"
    )
    url = f"http://127.0.0.1:{one.port}{one.path}"
    command = ["taskset", "-c", "1", "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}", "-s", str(script), url]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in told:
        sys.exit(f"{one.name} gave other answers than 200:\n{told}")
    rate = re.search(r"Requests/sec:\s*([\d.]+)", told)
    if rate is None:
        sys.exit(f"wrk told no rate:\n{told}")
    return float(rate[1])
