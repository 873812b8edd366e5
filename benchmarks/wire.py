"""What a call of a tiny model costs over the raw session's own: in process under a goal, by HTTP, and by gRPC.

By wire one client asks again as soon as it is answered, on one connection, and the client's own time counts too.
Beside it stands an echo on the libraries that our server uses, asked by the same client in turns: what it takes is not
ours, and goes up and down with the machine.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from accelerando.serve.governor import PRESETS, Decision, Signal
from benchmarks.figures import Figure, Found, fewer
from benchmarks.governor import WIDE
from benchmarks.ladders import Ground
from benchmarks.overhead import measure, tiny_bundle
from benchmarks.sender import Order, bodies
from benchmarks.served import Server

CALLS, DECISIONS, REQUESTS, WARM, TURN = 20_000, 20_000, 4_000, 200, 100
GOVERNED, DECIDE = 60e-6, 50e-6  # seconds
HTTP, HTTP_TAIL, GRPC = 0.6e-3, 1.2e-3, 0.9e-3
LAYOUTS = {"as it comes": (), "in the server's process": ("--no-isolate",)}


def overheads(ground: Ground) -> Found:
    """Every layer that a call may go through."""
    more, raw = measure(fewer(CALLS, 500), goal="p99 <= 10s")
    slowest, counted = np.quantile(decisions(fewer(DECISIONS, 500)), 0.99, axis=0)
    figures = [
        Figure("governed call over the raw session's, p50", _micro(more.mid), _micro(GOVERNED), more.mid <= GOVERNED),
        Figure("`decide`, p99", f"{_micro(slowest)} ({_micro(counted)})", _micro(DECIDE), slowest <= DECIDE),
    ]
    with tempfile.TemporaryDirectory() as folder:
        tiny_bundle(Path(folder))
        for layout, options in LAYOUTS.items():
            figures += by_wire(Path(folder) / "bundle", layout, options, raw.mid)
    return Found(
        tuple(figures),
        f"A model of one matrix product, which takes its session {_micro(raw.mid)}. Governed: the interval of the "
        f"median is {_micro(more.low)} to {_micro(more.high)}. `decide` had 16 requests before it, {len(WIDE)} rungs; "
        "in brackets: the p99 of a plain sum that takes as long as a decision in the median, in turns with it. "
        "By wire: one row in binary tensors, from the first byte that is sent to the last that comes, less the "
        "session's own time; the server computes in a process of its own unless it is told not to. In brackets: what "
        "an echo takes on the same libraries, in turns with ours.",
    )


def by_wire(bundle: Path, layout: str, options: tuple[str, ...], raw: float) -> list[Figure]:
    """HTTP and gRPC of one server."""
    requests = fewer(REQUESTS, 100)
    with Server("tiny", bundle, "--goal", "p99 <= 10s", "--no-watch", *options) as server, echo() as mirror:
        http, grpc = (in_turns(client, (server, mirror), requests) for client in (http_client, grpc_client))
    found = []
    for what, (ours, echoed), share, asked in (
        ("HTTP, p50", http, 0.5, HTTP),
        ("HTTP, p99", http, 0.99, HTTP_TAIL),
        ("gRPC, p50", grpc, 0.5, GRPC),
    ):
        figure, bare = float(np.quantile(ours, share)) - raw, float(np.quantile(echoed, share))
        words = f"{what} over the session's own call, {layout}"
        told = f"{figure * 1e3:.2f} ms ({bare * 1e3:.2f})"
        found.append(Figure(words, told, f"{asked * 1e3:g} ms", figure <= asked))
    return found


class Place(Protocol):
    """Where a client asks."""

    host: str
    port: int
    grpc_port: int


class Echo:
    """As `Place`."""

    def __init__(self, port: int, grpc_port: int) -> None:
        self.host, self.port, self.grpc_port = "127.0.0.1", port, grpc_port


@contextmanager
def echo() -> Iterator[Echo]:
    """The echo, in a process of its own."""
    script = Path(__file__).parent / "handlers" / "echo_handler.py"
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield Echo(*(int(process.stdout.readline().rpartition(":")[2]) for _ in range(2)))
        finally:
            process.terminate()


Client = Callable[[Place, ExitStack], Callable[[], None]]


def in_turns(client: Client, places: tuple[Place, ...], requests: int) -> list[np.ndarray]:
    """Seconds of each of so many requests at each place, some at a time in turns, after some that warm it."""
    with ExitStack() as stack:
        asks = [client(place, stack) for place in places]
        for ask in asks:
            timed(ask, WARM)
        turns = [[timed(ask, TURN) for ask in asks] for _ in range(max(requests // TURN, 1))]
    return [np.concatenate(column) for column in zip(*turns, strict=True)]


def timed(call: Callable[[], None], count: int) -> np.ndarray:
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return np.array(seconds)


def http_client(place: Place, stack: ExitStack) -> Callable[[], None]:
    """Asks once, on a connection that is kept until the stack ends."""
    (body,) = bodies(Order(place.port, "/v2/models/tiny/infer", "x"), np.ones((1, 1, 64), np.float32))
    line = stack.enter_context(closing(socket.create_connection((place.host, place.port))))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask() -> None:
        line.sendall(body)
        reply = line.recv(65536)
        while b"\r\n\r\n" not in reply or len(reply) < _whole(reply):
            reply += line.recv(65536)
        if not reply.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {reply[:200]!r}")

    return ask


def _whole(reply: bytes) -> int:
    """How long a reply is whose head has come."""
    head, _, _ = reply.partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length:")
    return len(head) + 4 + int(length.split(b"\r\n", 1)[0])


def grpc_client(place: Place, stack: ExitStack) -> Callable[[], None]:
    """Asks once, on a channel that is kept until the stack ends."""
    import grpc

    from accelerando.server.protocol import inference

    protocol = inference()
    method = protocol.methods["ModelInfer"]
    row = np.ones((1, 64), np.float32)
    channel = stack.enter_context(grpc.insecure_channel(f"{place.host}:{place.grpc_port}"))
    call = channel.unary_unary(
        f"/{protocol.service}/ModelInfer",
        request_serializer=method.request.SerializeToString,
        response_deserializer=method.response.FromString,
    )

    def ask() -> None:
        request = method.request(model_name="tiny", raw_input_contents=[row.tobytes()])
        request.inputs.add(name="x", datatype="FP32", shape=row.shape)
        for raw in call(request, timeout=30).raw_output_contents:
            np.frombuffer(raw, np.float32)

    return ask


def decisions(count: int) -> np.ndarray:
    """Seconds of so many decisions, on a long ladder and queues of all kinds; and of a sum after each: (count, 2)."""
    rng, seconds = np.random.default_rng(0), []
    last: Decision | None = None
    steps = 1
    for i in range(count):
        waits = np.sort(rng.uniform(0.01, 0.3, 16))
        queue = tuple((float(slack), int(rows), 0.0) for slack, rows in zip(waits, rng.integers(1, 4, 16), strict=True))
        rate, slowdown = float(rng.uniform(1, 200)), float(rng.uniform(0.8, 2.0))
        signal = Signal(0.01 * i, int(rng.integers(16, 300)), queue, rate, slowdown, 0.3)
        start = time.perf_counter()
        found = PRESETS["balanced"].decide(last, signal, WIDE)
        decided = time.perf_counter()
        sum(range(steps))
        seconds.append((decided - start, time.perf_counter() - decided))
        last = found if found.rung is not None else last
        steps += 5 if seconds[-1][1] < decided - start else -5  # until half of the sums take longer
    return np.array(seconds)


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
