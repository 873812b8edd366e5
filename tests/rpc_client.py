"""A gRPC server in a thread, a client of it, and requests to make: for the tests of the protocol over gRPC."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from shelf import DOUBLE, FakeServed, FakeShelf, double, signature_of

from accelerando.errors import ClosedError, DeadlineError, OverloadedError, RowsError
from accelerando.server.access import Settings
from accelerando.server.protocol import inference
from accelerando.server.rpc import serve_rpc

M = inference().messages
SERVICE = inference().service
Code = grpc.StatusCode
HALVES = signature_of({"x": ("float16", ("batch", 2))}, {"y": ("float16", ("batch", 2))})
WORDS = signature_of({"text": ("object", ("batch", "n"))}, {"loud": ("object", ("batch", "n"))})
FIXED = signature_of({"x": ("float32", (2, 3))}, {"y": ("float32", (2, 3))})
KINDS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")
ALL = signature_of(
    {f"in_{kind}": (kind, ("batch", 2)) for kind in KINDS}, {f"out_{kind}": (kind, ("batch", 2)) for kind in KINDS}
)


def shout(leaves: list[Any]) -> list[Any]:
    return [np.array([[str(word).upper() for word in row] for row in leaves[0]], object)]


def same(leaves: list[Any]) -> list[Any]:
    return leaves


# --- a server in a thread, and a client -------------------------------------------------------------------------


class Client:
    """Calls by name, with the messages of our own protocol file."""

    def __init__(self, channel: grpc.Channel, port: int = 0) -> None:
        self.channel, self.port = channel, port
        self.stop: Callable[[float], Future[None]]

    def method(self, name: str) -> Any:
        method = inference().methods[name]
        kind = self.channel.stream_stream if method.takes_stream else self.channel.unary_unary
        return kind(
            f"/{SERVICE}/{name}",
            request_serializer=lambda m: m if isinstance(m, bytes) else m.SerializeToString(),
            response_deserializer=method.response.FromString,
        )

    def __call__(self, name: str, request: Any = b"", **how: Any) -> Any:
        return self.method(name)(request, **{"timeout": 20, **how})

    def refused(self, name: str, request: Any = b"", **how: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self(name, request, **how)
        return caught.value.code(), caught.value.details()


@contextmanager
def serving(shelf: Any, settings: Settings | None = None, *, keys: Any = None, **given: Any) -> Iterator[Client]:
    """A server in a thread of its own, and a client of it, with `keys` an encrypted one.

    `client.stop(grace)` stops the server at once.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def begin() -> Any:
        server = serve_rpc(shelf, settings or Settings(), **{"port": 0, **given})
        await server.start()
        return server

    try:
        server = run(begin())
        address = f"127.0.0.1:{server.port}"
        try:
            with grpc.secure_channel(address, keys) if keys else grpc.insecure_channel(address) as channel:
                client = Client(channel, server.port)
                client.stop = lambda grace: asyncio.run_coroutine_threadsafe(server.stop(grace), loop)
                yield client
        finally:
            run(server.stop(5.0))
    finally:
        run(loop.shutdown_default_executor())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def models_of_every_kind() -> FakeShelf:
    def failing(error: Exception) -> FakeServed:
        return FakeServed(DOUBLE, double, refusal=error)

    def poisoned(leaves: list[Any]) -> list[Any]:
        raise RowsError("the model divides by zero on row 0")

    return FakeShelf(
        {
            "simple": FakeServed(),
            "double": {"1": FakeServed(DOUBLE, double), "2": FakeServed(DOUBLE, double, answers="thread")},
            "halves": FakeServed(HALVES, same),
            "words": FakeServed(WORDS, shout),
            "all": FakeServed(ALL, same),
            "fixed": FakeServed(FIXED, same),
            "busy": failing(OverloadedError("the queue is full")),
            "late": failing(DeadlineError("its deadline passed")),
            "closed": failing(ClosedError("it is being let go")),
            "poisoned": FakeServed(DOUBLE, poisoned),
            "broken": failing(ZeroDivisionError("a secret of the server")),
        },
        out={"unloaded": FakeServed(DOUBLE, double)},
    )


def simple(a: Any = None, b: Any = None, **fields: Any) -> Any:
    """A raw request to `simple`."""
    a = np.arange(16, dtype=np.int32)[None] if a is None else a
    b = np.ones_like(a) if b is None else b
    request = M.ModelInferRequest(**{"model_name": "simple", **fields})
    for name, array in (("INPUT0", a), ("INPUT1", b)):
        request.inputs.add(name=name, datatype="INT32", shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def twice(array: Any, model: str = "double") -> Any:
    """A raw request to `double` or its like."""
    request = M.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype={"f": "FP32", "e": "FP16"}[array.dtype.char], shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def with_parameter(request: Any, name: str, value: Any) -> Any:
    which = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
    setattr(request.parameters[name], which, value)
    return request


X = np.arange(8, dtype=np.float32).reshape(2, 4)
