"""What a call of a tiny model costs over the raw session's own: in process under a goal, by HTTP, and by gRPC.

By wire one client asks again as soon as it is answered, on one connection, and the client's own time counts too.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from accelerando.serve.governor import PRESETS, Decision, Signal
from benchmarks.figures import Figure, Found, fewer
from benchmarks.governor import WIDE
from benchmarks.ladders import Ground
from benchmarks.overhead import measure, tiny_bundle
from benchmarks.sender import Order, bodies
from benchmarks.served import Server

CALLS, DECISIONS, REQUESTS, WARM = 20_000, 20_000, 4_000, 200
GOVERNED, DECIDE = 60e-6, 50e-6  # seconds
HTTP, HTTP_TAIL, GRPC = 0.6e-3, 1.2e-3, 0.9e-3
LAYOUTS = {"as it comes": (), "in the server's process": ("--no-isolate",)}


def overheads(ground: Ground) -> Found:
    """Every layer that a call may go through."""
    more, raw = measure(fewer(CALLS, 500), goal="p99 <= 10s")
    slowest = float(np.quantile(decisions(fewer(DECISIONS, 500)), 0.99))
    figures = [
        Figure("governed call over the raw session's, p50", _micro(more.mid), _micro(GOVERNED), more.mid <= GOVERNED),
        Figure("`decide`, p99", _micro(slowest), _micro(DECIDE), slowest <= DECIDE),
    ]
    with tempfile.TemporaryDirectory() as folder:
        tiny_bundle(Path(folder))
        for layout, options in LAYOUTS.items():
            figures += by_wire(Path(folder) / "bundle", layout, options, raw.mid)
    return Found(
        tuple(figures),
        f"A model of one matrix product, which takes its session {_micro(raw.mid)}. Governed: the interval of the "
        f"median is {_micro(more.low)} to {_micro(more.high)}. `decide` had 16 requests before it, {len(WIDE)} rungs. "
        "By wire: one row in binary tensors, from the first byte that is sent to the last that comes, less the "
        "session's own time; the server computes in a process of its own unless it is told not to.",
    )


def by_wire(bundle: Path, layout: str, options: tuple[str, ...], raw: float) -> list[Figure]:
    """HTTP and gRPC of one server."""
    requests = fewer(REQUESTS, 100)
    with Server("tiny", bundle, "--goal", "p99 <= 10s", "--no-watch", *options) as server:
        http, grpc = (call(server, requests) - raw for call in (http_seconds, grpc_seconds))
    found = []
    for what, seconds, share, asked in (
        ("HTTP, p50", http, 0.5, HTTP),
        ("HTTP, p99", http, 0.99, HTTP_TAIL),
        ("gRPC, p50", grpc, 0.5, GRPC),
    ):
        figure = float(np.quantile(seconds, share))
        words = f"{what} over the session's own call, {layout}"
        found.append(Figure(words, f"{figure * 1e3:.2f} ms", f"{asked * 1e3:g} ms", figure <= asked))
    return found


def http_seconds(server: Server, requests: int) -> np.ndarray:
    """Seconds of each request."""
    (body,) = bodies(Order(server.port, "/v2/models/tiny/infer", "x"), np.ones((1, 1, 64), np.float32))
    with closing(socket.create_connection((server.host, server.port))) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def ask() -> None:
            line.sendall(body)
            reply = line.recv(65536)
            while b"\r\n\r\n" not in reply or len(reply) < _whole(reply):
                reply += line.recv(65536)
            if not reply.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the server answered {reply[:200]!r}")

        return timed(ask, requests)


def _whole(reply: bytes) -> int:
    """How long a reply is whose head has come."""
    head, _, _ = reply.partition(b"\r\n\r\n")
    _, _, length = head.lower().partition(b"content-length:")
    return len(head) + 4 + int(length.split(b"\r\n", 1)[0])


def grpc_seconds(server: Server, requests: int) -> np.ndarray:
    """Seconds of each request."""
    import grpc

    from accelerando.server.protocol import inference

    protocol = inference()
    method = protocol.methods["ModelInfer"]
    row = np.ones((1, 64), np.float32)
    with grpc.insecure_channel(f"{server.host}:{server.grpc_port}") as channel:
        call = channel.unary_unary(
            f"/{protocol.service}/ModelInfer",
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )

        def ask() -> None:
            request = method.request(model_name="tiny", raw_input_contents=[row.tobytes()])
            request.inputs.add(name="x", datatype="FP32", shape=row.shape)
            np.frombuffer(call(request, timeout=30).raw_output_contents[0], np.float32)

        return timed(ask, requests)


def timed(call: Callable[[], None], count: int) -> np.ndarray:
    """Seconds of each of so many calls, after some that warm it."""
    seconds = []
    for _ in range(WARM + count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[WARM:])


def decisions(count: int) -> np.ndarray:
    """Seconds of each of so many decisions, on a long ladder and queues of all kinds."""
    rng, seconds = np.random.default_rng(0), []
    last: Decision | None = None
    for i in range(count):
        waits = np.sort(rng.uniform(0.01, 0.3, 16))
        queue = tuple((float(slack), int(rows), 0.0) for slack, rows in zip(waits, rng.integers(1, 4, 16), strict=True))
        rate, slowdown = float(rng.uniform(1, 200)), float(rng.uniform(0.8, 2.0))
        signal = Signal(0.01 * i, int(rng.integers(16, 300)), queue, rate, slowdown, 0.3)
        start = time.perf_counter()
        found = PRESETS["balanced"].decide(last, signal, WIDE)
        seconds.append(time.perf_counter() - start)
        last = found if found.rung is not None else last
    return np.array(seconds)


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
