"""The health protocol of gRPC, by which probes and load balancers ask: of the server, or of one model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from accelerando.errors import ClosedError, UnknownModelError
from accelerando.server.calls import Calls
from accelerando.server.protocol import health, inference

LOOK = 1.0  # seconds between two looks at what somebody watches: a repository does not tell of its changes
MOST_WATCHING = 50  # for nobody needs a token to watch
M = health().messages
State = M.HealthCheckResponse


class Probes:
    """Answers `Check` and `Watch` from what is ready at the moment; nobody needs a token for it."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.watching = calls, 0

    def handlers(self) -> Any:
        """Both methods."""
        check, watch = (
            grpc.unary_unary_rpc_method_handler(self.check),
            grpc.unary_stream_rpc_method_handler(self.watch),
        )
        return grpc.method_handlers_generic_handler(health().service, {"Check": check, "Watch": watch})

    async def check(self, data: bytes, context: Any) -> bytes:
        """The state just now; NOT_FOUND where neither a service nor a model has this name."""
        state = self._state(await _service(data, context))
        if state == State.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service and no model has this name")
        return State(status=state).SerializeToString()

    async def watch(self, data: bytes, context: Any) -> AsyncIterator[bytes]:
        """The state now and whenever it changes, until the server stops."""
        service = await _service(data, context)
        if self.watching >= MOST_WATCHING:
            words = f"{self.watching} callers watch, the most that may; ask by Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
        self.watching += 1
        try:
            async for state in self._changes(service):
                yield State(status=state).SerializeToString()
        finally:
            self.watching -= 1

    async def _changes(self, service: str) -> AsyncIterator[int]:
        stopping, last = self.calls.stopping, None
        while True:
            state = self._state(service)
            if state != last:
                yield state
            if stopping.is_set():
                return
            last = state
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stopping.wait(), LOOK)

    def _state(self, service: str) -> int:
        """Of the whole server where no service is named, or that of the protocol; else of the model of this name."""
        if self.calls.stopping.is_set():
            return State.NOT_SERVING
        if service in ("", inference().service, health().service):
            return State.SERVING if self.calls.shelf.ready else State.NOT_SERVING
        try:
            return State.SERVING if self.calls.shelf.find(service).ready else State.NOT_SERVING
        except ClosedError:
            return State.NOT_SERVING
        except UnknownModelError:
            return State.SERVICE_UNKNOWN


async def _service(data: bytes, context: Any) -> str:
    try:
        return M.HealthCheckRequest.FromString(data).service
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the {len(data)} bytes that were sent are no request")
        raise AssertionError("abort always raises") from None
