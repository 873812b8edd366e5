"""A bundle that is loaded anew under a steady load, by the API and by its folder: how long requests take meanwhile.

Meanwhile is from the order until every rung of the new bundle is there; the server has taken it over long before.
Quiet are the times before and between, in turns with the reloads, for the machine is not as fast at all times.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from accelerando.bundle import Bundle
from accelerando.serve.traces import poisson
from benchmarks.figures import Figure, Found, shortened
from benchmarks.ladders import Ground
from benchmarks.sender import Order, Sent, rate, sent
from benchmarks.served import Server

LOOP_SECONDS, QUIET_SECONDS, SECONDS, PAUSE = 2.0, 4.0, 90.0, 3.0
SETTLED = 0.5  # seconds after a reload from which on it counts as quiet: who came meanwhile has been answered
NOTICED_SECONDS = 30.0  # at most until a changed folder is noticed and loaded
CROWD = 16  # rows of a request
LOAD = 0.4  # of what one connection gets that asks again and again
WORSE = 1.5
GOAL = "p99 <= 10s, drop <= 1%"  # which the ladder's faster rungs do not keep: who takes over must have a better one


@dataclass(frozen=True)
class Window:
    """When the bundle was being loaded anew, and who told the server to."""

    began: float
    ended: float
    how: str


def swapped(ground: Ground) -> Found:
    """p99 while a bundle is loaded anew, over the quiet one, and failed requests.

    Raises:
        RuntimeError: a change of the folder was not noticed in time.
    """
    rows = ground.crowds(CROWD, 64)
    quiet, whole = shortened(QUIET_SECONDS, 3.0), shortened(SECONDS, 15.0)
    windows: list[Window] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(ground.path, Path(folder) / "vit"))
        with Server("vit", bundle, "--goal", GOAL) as server:
            order = Order(server.port, "/v2/models/vit/infer", Bundle.open(bundle).signature.inputs[0].name)
            carried = rate(replace(order, connections=1, seconds=LOOP_SECONDS), rows)

            def disturb(start: float) -> None:
                time.sleep(max(start + quiet - time.monotonic(), 0.0))
                windows.append(by_folder(server, bundle))
                while time.monotonic() < start + whole - 2 * (windows[-1].ended - windows[-1].began) - PAUSE:
                    time.sleep(PAUSE)
                    windows.append(by_api(server))

            trace = poisson(rate=LOAD * carried, seconds=whole, seed=5)
            found = sent(order, rows, trace.arrivals, disturb)
    return told(found, float(found.planned[0]) + quiet, windows)


def by_api(server: Server) -> Window:
    """The server is told to load what its folder holds."""
    began = time.monotonic()
    server.reload()
    server.wait_for_rungs()
    return Window(began, time.monotonic(), "by the API")


def by_folder(server: Server, bundle: Path) -> Window:
    """The bundle's manifest is touched, and the server goes over to what it finds there."""
    began, version = time.monotonic(), server.version
    os.utime(bundle / "manifest.json")
    while server.version == version:
        if time.monotonic() > began + NOTICED_SECONDS:
            raise RuntimeError(f"the changed folder was not loaded within {NOTICED_SECONDS:g} s")
        time.sleep(0.05)
    server.wait_for_rungs()
    return Window(began, time.monotonic(), "by its folder")


def told(found: Sent, disturbed: float, windows: Sequence[Window]) -> Found:
    """What became of the requests in the windows, and before and between them."""
    at = found.planned
    meanwhile, calm = np.zeros(len(at), bool), (at >= at[0] + 1) & (at < disturbed)
    for window, after in zip(windows, [*windows[1:], None], strict=True):
        meanwhile |= (at >= window.began) & (at <= window.ended)
        calm |= (at > window.ended + SETTLED) & (at < (after.began if after else np.inf))
    meanwhile &= found.good
    calm &= found.good
    before, then = (float(np.quantile(found.seconds[which], 0.99)) for which in (calm, meanwhile))
    middle = [float(np.median(found.seconds[which])) for which in (calm, meanwhile)]
    lasted = [w.ended - w.began for w in windows]
    failed, span = int((~found.good).sum()), float(found.planned[-1] - found.planned[0])
    ratio = then / before
    return Found(
        (
            Figure("p99 while reloading over the quiet one", f"{ratio:.2f}", f"{WORSE}", ratio <= WORSE),
            Figure("requests that failed meanwhile", f"{failed} of {len(found.good):,}", "none", failed == 0),
        ),
        f"Hot reload, {GOAL}: {len(found.good) / span:,.0f} requests/s of {CROWD} rows over HTTP, {LOAD:.0%} of what "
        f"one connection gets, {found.punctual:.1%} sent on time. The bundle was loaded anew {len(windows)} times, "
        f"{windows[0].how} first and then {windows[-1].how}, in {min(lasted):.1f} to {max(lasted):.1f} s each until "
        f"its last rung was there, {PAUSE:g} s apart. "
        f"p99 was {before * 1e3:.1f} ms in {int(calm.sum()):,} requests before and between, from {SETTLED:g} s after "
        f"a reload on, {then * 1e3:.1f} ms in the "
        f"{int(meanwhile.sum()):,} sent meanwhile; p50 {middle[0] * 1e3:.1f} and {middle[1] * 1e3:.1f} ms.",
    )
