"""Requests per second of a tiny model over HTTP: our server against handlers around the same session.

Each server has one core to itself (all its processes), and the load generator, wrk, the other.  They take turns, round
by round.  Others' packages are installed into a venv of their own each, in the cache; where one can't be, or does not
answer, the table says why.
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
PATH = "/v2/models/tiny/infer"
OURS = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": ROW[0]}]})
PACKAGES = {
    "FastAPI": ("fastapi", "uvicorn[standard]"), "LitServe": ("litserve",), "BentoML": ("bentoml",),
    "MLServer": ("mlserver",),
}  # fmt: skip


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
        rates = contest(found, absent, Path(folder))
    ours = np.array(rates[found[0].name])
    lines, best = [], 0.0
    for one in (one for one in found if one.name in rates):
        theirs = np.array(rates[one.name])
        ratio = median_interval(ours / theirs)
        if not one.name.startswith("accelerando"):
            best = max(best, float(np.median(theirs)))
        lines.append([one.name, f"{np.median(theirs):,.0f}", f"{ratio.mid:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"])
    lines += [[name, "not there", why] for name, why in absent.items()]
    over = float(np.median(ours)) / best if best else float("nan")
    good = np.median(ours) >= ASKED_RATE and over >= ASKED_RATIO
    body = table(["server", "requests/s, one core", "ours over it"], lines)
    body += (
        f"\n\n{CONNECTIONS} connections, a row of 64 numbers as JSON, {ROUNDS} rounds of {SECONDS} s in turns. Asked "
        f"for: at least {ASKED_RATE:,.0f}/s and {ASKED_RATIO} times the best of the others; ours has "
        f"{np.median(ours):,.0f}/s and {over:.2f} times, {'reached' if good else 'not reached'}."
    )
    record(name, "Requests per second of a tiny model over HTTP", body)


def contestants(bundle: Path, model: Path) -> tuple[list[Contestant], dict[str, str]]:
    """Ours, in this process and apart, and everybody else who can be installed; and who can't, with the reason."""
    serve = (sys.executable, "-c", "from accelerando.cli import main; main()", "serve", f"tiny={bundle}")
    common = ("--grpc-port", "-1", "--goal", "p99 <= 10s", "--no-watch")
    found = [
        Contestant("accelerando, --no-isolate", (*serve, *common, "--no-isolate", "--port", "8810"), 8810, PATH, OURS),
        Contestant("accelerando", (*serve, *common, "--port", "8811"), 8811, PATH, OURS),
    ]
    absent = {}
    for port, (name, packages) in enumerate(PACKAGES.items(), 8812):
        python = installed(name, packages)
        if isinstance(python, str):
            absent[name] = python
        else:
            found.append(another(name, python, model, port))
    return found, absent


def another(name: str, python: Path, model: Path, port: int) -> Contestant:
    """One of the others, started as its own pages say."""
    programs = python.parent
    if name == "MLServer":  # which speaks our protocol
        start = (str(programs / "mlserver"), "start", str(mlserver_folder(model.parent, port)))
        return Contestant(name, start, port, PATH, OURS)
    if name == "BentoML":
        folder = ("--working-dir", str(HERE))
        command = (str(programs / "bentoml"), "serve", "bentoml_handler:Tiny", *folder, "--port", str(port))
    else:
        command = (str(python), str(HERE / f"{name.lower()}_handler.py"), str(model), str(port))
    return Contestant(name, command, port, "/infer", PLAIN)


def mlserver_folder(beside: Path, port: int) -> Path:
    """What MLServer reads when it starts: quiet, and without worker processes, which cost it more than they give."""
    folder = beside / "mlserver"
    folder.mkdir()
    shutil.copy(HERE / "mlserver_handler.py", folder)
    ports = {"http_port": port, "grpc_port": port + 100, "metrics_port": port + 200}
    settings = {"host": "127.0.0.1", "debug": False, "parallel_workers": 0, **ports}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps({"name": "tiny", "implementation": "mlserver_handler.Tiny"}))
    return folder


def installed(name: str, packages: Sequence[str]) -> Path | str:
    """The Python of a venv that has these packages, or why they can't be had."""
    venv = CACHE / f"venv-{name.lower()}"
    python = venv / "bin" / "python"
    if (venv / "whole").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", *packages, "onnxruntime", "numpy"]
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        return f"pip: {(reasons or ['it failed'])[0].removeprefix('ERROR: ')}"
    (venv / "whole").touch()
    return python


def contest(found: Sequence[Contestant], absent: dict[str, str], folder: Path) -> dict[str, list[float]]:
    """Requests per second, round by round, of those that answer; who does not is written down as absent."""
    servers = [
        subprocess.Popen(["taskset", "-c", "0", *c.command], stdout=subprocess.DEVNULL, start_new_session=True)
        for c in found
    ]
    try:
        silent = {one.name: "it did not answer within two minutes" for one in found if not answers(one)}
        if found[0].name in silent:
            sys.exit(f"{found[0].name} did not answer within two minutes")
        absent.update(silent)
        there = [one for one in found if one.name not in silent]
        rates: dict[str, list[float]] = {one.name: [] for one in there}
        order = np.random.default_rng(0)
        for _ in range(ROUNDS):
            for i in order.permutation(len(there)):
                rates[there[i].name].append(hammer(there[i], folder))
        return rates
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(30)
            with contextlib.suppress(ProcessLookupError):  # some leave their workers behind, which poll
                os.killpg(server.pid, signal.SIGKILL)


def answers(one: Contestant) -> bool:
    """Whether it answers rightly, once it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{one.port}{one.path}", one.body.encode(), {"content-type": "application/json"}
    )
    for _ in range(240):
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                json.load(reply)
                return True
        except OSError:
            time.sleep(0.5)
    return False


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
