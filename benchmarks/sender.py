"""Requests over HTTP from a process of its own: `python -m benchmarks.sender FOLDER` sends what `sent` wrote there.

An open loop: the times are fixed beforehand, and a request goes out at its time whatever became of those before.  One
that finds no connection free waits for one, and its latency counts from the time at which it should have gone.  Without
times it is a closed loop: each connection asks again as soon as it is answered.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE = 5.0  # seconds after the last request for what is still to come
PUNCTUAL = 0.010  # seconds: who goes out within them of its time went on time


@dataclass(frozen=True)
class Order:
    """What is to be sent where.

    Args:
        path: of the URL, `port` of the loopback.
        name: of the model's one input, in float32.
        connections: that are kept open.
        seconds: of a closed loop.
    """

    port: int
    path: str
    name: str
    connections: int = 64
    seconds: float = 0.0


@dataclass(frozen=True)
class Sent:
    """What became of each request; times are of the system's monotonic clock, infinite for what never came.

    Args:
        planned, went, came: when it should have gone, when it went, when its answer was there.
        status: of HTTP; 0 where the connection was lost, or no answer came.
        rung: that answered, -1 where none did.
    """

    planned: np.ndarray
    went: np.ndarray
    came: np.ndarray
    status: np.ndarray
    rung: np.ndarray

    @property
    def good(self) -> np.ndarray:
        """Whether each was answered."""
        return self.status == 200

    @property
    def seconds(self) -> np.ndarray:
        """From when each should have gone to its answer."""
        return np.asarray(self.came - self.planned)

    @property
    def punctual(self) -> float:
        """The share that went out on time."""
        return float(np.mean(self.went - self.planned <= PUNCTUAL))


def sent(
    order: Order, rows: np.ndarray, arrivals: np.ndarray, meanwhile: Callable[[float], None] = lambda start: None
) -> Sent:
    """Have requests sent by another process.

    Args:
        rows: (requests, rows of each, ...); they are sent in turns.
        arrivals: seconds from the start, in order; empty for a closed loop.
        meanwhile: run beside it, told when the start is.

    Raises:
        RuntimeError: the sender failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "order.json").write_text(json.dumps(asdict(order)))
        np.savez(folder / "given.npz", rows=rows, arrivals=arrivals)
        command = [sys.executable, "-m", "benchmarks.sender", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                start = process.stdout.readline()
                if start:
                    meanwhile(float(start))
                _, words = process.communicate(timeout=order.seconds + float(arrivals.max(initial=0)) + 60)
            finally:
                process.kill()
        if process.returncode:
            raise RuntimeError(f"the sender failed: {words[-2000:]}")
        with np.load(folder / "found.npz", allow_pickle=False) as found:
            return Sent(**found)


def rate(order: Order, rows: np.ndarray) -> float:
    """Good answers a second in a closed loop."""
    found = sent(order, rows, np.zeros(0))
    end = found.went.min() + order.seconds
    return float((found.good & (found.came <= end)).sum() / order.seconds)


# --- in the other process ---------------------------------------------------------------------------------------------


def bodies(order: Order, rows: np.ndarray) -> list[bytes]:
    """Whole requests, of the protocol's binary kind."""
    found = []
    for some in np.ascontiguousarray(rows, np.float32):
        parameters = {"binary_data_size": some.nbytes}
        tensor = {"name": order.name, "datatype": "FP32", "shape": list(some.shape), "parameters": parameters}
        text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        head = (
            f"POST {order.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/octet-stream\r\n"
            f"inference-header-content-length: {len(text)}\r\ncontent-length: {len(text) + some.nbytes}\r\n\r\n"
        )
        found.append(head.encode() + text + some.tobytes())
    return found


class Wire(asyncio.Protocol):
    """A connection, with one request under way at most."""

    def __init__(self, sender: Sender) -> None:
        from httptools import HttpResponseParser

        self.sender, self.request, self.body = sender, -1, b""
        self.parser: Any = HttpResponseParser(self)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.sender.free(self)

    def send(self, request: int) -> None:
        self.request, self.body = request, b""
        self.sender.went[request] = time.monotonic()
        self.transport.write(self.sender.bodies[request % len(self.sender.bodies)])

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self.body = self.body or data

    def on_message_complete(self) -> None:
        request, self.request = self.request, -1
        rung = re.search(rb'"rung":\s*(\d+)', self.body)
        self.sender.note(request, self.parser.get_status_code(), int(rung[1]) if rung else -1)
        self.sender.free(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.sender.lost(self)


class Sender:
    """Who sends, and notes what became of it."""

    def __init__(self, order: Order, rows: np.ndarray, arrivals: np.ndarray) -> None:
        self.order, self.bodies, self.arrivals = order, bodies(order, rows), arrivals
        self.went: dict[int, float] = {}
        self.came: dict[int, tuple[float, int, int]] = {}
        self.count = 0
        self.idle: list[Wire] = []
        self.waiting: deque[int] = deque()
        self.end = 0.0  # of a closed loop
        self.done = False
        self.tasks: set[Any] = set()

    def free(self, wire: Wire) -> None:
        """A connection has nothing to do."""
        if self.waiting:
            wire.send(self.waiting.popleft())
        elif time.monotonic() < self.end:
            self.count += 1
            wire.send(self.count - 1)
        else:
            self.idle.append(wire)

    def note(self, request: int, status: int, rung: int) -> None:
        self.came[request] = time.monotonic(), status, rung

    def lost(self, wire: Wire) -> None:
        """The server hung up: whoever was under way is lost, and another connection is opened."""
        if wire.request >= 0:
            self.note(wire.request, 0, -1)
        if wire in self.idle:
            self.idle.remove(wire)
        if self.done:
            return
        task = asyncio.get_running_loop().create_task(self.open())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def open(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: Wire(self), "127.0.0.1", self.order.port)

    async def send(self) -> Sent:
        await asyncio.gather(*(self.open() for _ in range(self.order.connections)))
        start = time.monotonic() + 0.2
        print(start, flush=True)
        await asyncio.sleep(0.2)
        if self.order.seconds:
            self.end = time.monotonic() + self.order.seconds
            idle, self.idle = self.idle, []
            for wire in idle:
                self.free(wire)
            await asyncio.sleep(self.order.seconds)
        for number, arrival in enumerate(self.arrivals):
            await asyncio.sleep(max(start + arrival - time.monotonic(), 0.0))
            if self.idle:
                self.idle.pop().send(number)
            else:
                self.waiting.append(number)
        self.count = self.count or len(self.arrivals)
        until = time.monotonic() + PATIENCE
        while len(self.came) < self.count and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.done = True
        return self.found(start)

    def found(self, start: float) -> Sent:
        numbers = range(self.count)
        lost = (float("inf"), 0, -1)
        came, status, rung = np.array([self.came.get(n, lost) for n in numbers]).reshape(-1, 3).T
        went = np.array([self.went.get(n, float("inf")) for n in numbers])
        planned = start + self.arrivals if len(self.arrivals) else went
        return Sent(planned, went, np.where(status > 0, came, float("inf")), status.astype(int), rung.astype(int))


def main(folder: Path) -> None:
    import uvloop

    order = Order(**json.loads((folder / "order.json").read_text()))
    with np.load(folder / "given.npz", allow_pickle=False) as given:
        sender = Sender(order, given["rows"], given["arrivals"])
    np.savez(folder / "found.npz", **vars(uvloop.run(sender.send())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
