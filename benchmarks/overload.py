"""Three times what the fastest rung carries, sent to a real server by another process; then a load that it carries.

Requests have many rows, so that computing costs more than sending: the sender has no core of its own.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np

from accelerando.bundle import Bundle
from accelerando.serve.traces import poisson
from benchmarks.figures import Figure, Found, shortened
from benchmarks.ladders import Ground
from benchmarks.sender import Order, Sent, rate, sent
from benchmarks.served import Server

SLO = 0.3  # seconds
TOLD = 0.24  # of them the server is told; the rest is for the way there and back
OVER = 3.0  # times what the fastest rung carries
SECONDS, CALM_SECONDS, LOOP_SECONDS = 60.0, 6.0, 10.0
CROWD = 256  # rows of a request
CONNECTIONS = 256
GOODPUT, GROWTH = 0.9, 0.05


def overloaded(ground: Ground) -> Found:
    """Goodput, memory, and how soon all is as before."""
    rows = ground.crowds(CROWD, 24)
    bundle = Bundle.open(ground.path, hashes=False)
    with Server("vit", ground.path, "--no-watch", "--goal", f"p99 <= {TOLD * 1e3:g}ms") as server:
        order = Order(server.port, "/v2/models/vit/infer", bundle.signature.inputs[0].name, CONNECTIONS)
        loop = replace(order, connections=8, seconds=shortened(LOOP_SECONDS))
        best = rate(replace(loop, connections=1), rows)
        fastest = f"speedup >= {bundle.ladder.fastest.speedup.low * 0.9:.3f}"
        server.set_goal(fastest)
        alone = rate(loop, rows)
        server.set_goal(f"p99 <= {TOLD * 1e3:g}ms")
        busy = poisson(rate=OVER * alone, seconds=shortened(SECONDS, 3.0), seed=3)
        calm = poisson(rate=0.5 * best, seconds=shortened(CALM_SECONDS, 3.0), seed=4)
        arrivals = np.concatenate([busy.arrivals, busy.seconds + calm.arrivals])
        with Memory(server) as memory:
            found = sent(order, rows, arrivals)
        server.set_goal(fastest)
        alone = (alone + rate(loop, rows)) / 2  # before and after: the machine's speed drifts
    return told(found, len(busy), busy.seconds, alone, best, memory)


class Memory:
    """Reads a server's memory all the while."""

    def __init__(self, server: Server) -> None:
        self._server, self._ended = server, threading.Event()
        self.seen: list[tuple[float, int]] = []
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._ended.wait(0.2):
            self.seen.append((time.monotonic(), self._server.memory()))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def usual(self, start: float, end: float) -> float:
        """Bytes, in the median, between two moments: the most is that of a queue, which is chance."""
        held = [held for at, held in self.seen if start <= at <= end]
        return float(np.median(held)) if held else 0.0

    @property
    def most(self) -> int:
        return max((held for _, held in self.seen), default=0)


def told(found: Sent, count: int, seconds: float, alone: float, best: float, memory: Memory) -> Found:
    """What became of the overload, its first `count` requests, and of the calm after it."""
    start = float(found.planned[0])
    in_time = found.good & (found.seconds <= SLO)
    goodput = float(in_time[:count].sum()) / seconds
    offered = float((found.went[:count] - start <= seconds).sum()) / seconds
    first, last = (memory.usual(start + a * seconds / 3, start + (a + 1) * seconds / 3) for a in (1, 2))
    grown = last / first - 1 if first else float("nan")
    missed = found.planned[count:][~in_time[count:]]
    back = float(missed.max() - start - seconds) if len(missed) else 0.0
    climbed = found.planned[count:][found.rung[count:] == found.rung[count:][-1]]
    climb = float(climbed.min() - start - seconds) if len(climbed) else float("nan")
    statuses = ", ".join(f"{n:,} with {s}" for s, n in zip(*np.unique(found.status, return_counts=True), strict=True))
    return Found(
        (
            Figure("goodput at 3 x the fastest rung's capacity", f"{goodput / alone:.0%} of it", "90 %",
                   goodput >= GOODPUT * alone),
            Figure("memory, last third of the overload over the middle one, medians", f"{grown:+.1%}",
                   "bounded: +5 % at most", grown <= GROWTH),
            Figure("last miss after the overload", f"{back:.2f} s after its end", f"{2 * SLO:g} s", back <= 2 * SLO),
        ),
        f"Overload: {len(found.planned[:count]):,} requests of {CROWD} rows in {seconds:.0f} s, {count / seconds:,.0f} "
        f"a second, for a server whose fastest rung answers {alone:,.0f}/s in a closed loop of 8 connections, "
        f"before and after; Poisson arrivals, {CONNECTIONS} connections, HTTP with binary tensors, sent by a process "
        f"of its own, which shares the machine's cores with the server's two. It really sent {offered:,.0f} a "
        f"second ({offered / alone:.2f} times the capacity), {found.punctual:.1%} of all within 10 ms of their time; "
        f"latency counts from that time. "
        f"The server is told {TOLD * 1e3:.0f} ms of the {SLO * 1e3:.0f}. Answered in time: {goodput:,.0f}/s; answers "
        f"by status: {statuses} (0: none came). The server and its process held "
        f"{last / 1e6:.0f} MB in the median of the last third, and {memory.most / 1e6:.0f} MB at most. Then "
        f"half of what one connection gets from the best rung ({best:,.0f}/s): the rung on which it ended first "
        f"answered {climb:.2f} s after the overload.",
    )  # fmt: skip
