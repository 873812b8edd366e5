"""The Open Inference Protocol over gRPC: `serve_rpc` makes the server.

    server = serve_rpc(shelf, Settings(), port=8001)     # inside the event loop that is to serve
    await server.start()
    ...
    await server.stop(grace=10.0)

Messages are taken as bytes and parsed here, so that bytes which are no message get INVALID_ARGUMENT like any other bad
input; grpc itself would call them an INTERNAL error.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from accelerando.errors import (
    AccelerandoError,
    BundleError,
    ClosedError,
    DataError,
    DeadlineError,
    MissingExtraError,
    OverloadedError,
    RefusalError,
    UnknownModelError,
    UsageError,
)
from accelerando.server.access import Settings, Tokens
from accelerando.server.calls import Calls
from accelerando.server.probes import Probes
from accelerando.server.protocol import Method, inference
from accelerando.server.repository import Repository
from accelerando.server.tracing import OFF, Tracing
from accelerando.server.traffic import Traffic

log = logging.getLogger(__name__)
LONGEST = 1_200  # bytes of an error's text: it travels percent-encoded in a header, of which clients take 8 KiB
OPEN = ("ServerLive", "ServerReady")  # what watches a server has no token
LAST_SECONDS = 0.2  # for what a client of a stream sent before the server was told to end
SPARE_CALLS = 100  # beyond the most, for those and for probes: who watches must not take a busy server for a dead one
COMPRESSIONS = {
    "none": grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip, "deflate": grpc.Compression.Deflate,
}  # fmt: skip
STATUSES: tuple[tuple[type[AccelerandoError], grpc.StatusCode], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND),
    (MissingExtraError, grpc.StatusCode.UNIMPLEMENTED),
    (RefusalError, grpc.StatusCode.UNIMPLEMENTED),
    (ClosedError, grpc.StatusCode.UNAVAILABLE),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (BundleError, grpc.StatusCode.FAILED_PRECONDITION),
    (AccelerandoError, grpc.StatusCode.INTERNAL),
)
NO_SHARED_MEMORY = "shared memory is not served; send the tensors in raw_input_contents"
UNSERVED = {
    "SystemSharedMemoryStatus": NO_SHARED_MEMORY,
    "SystemSharedMemoryRegister": NO_SHARED_MEMORY,
    "SystemSharedMemoryUnregister": NO_SHARED_MEMORY,
    "CudaSharedMemoryStatus": NO_SHARED_MEMORY,
    "CudaSharedMemoryRegister": NO_SHARED_MEMORY,
    "CudaSharedMemoryUnregister": NO_SHARED_MEMORY,
    "TraceSetting": "tracing is set when the server starts",
    "LogSettings": "logs are set when the server starts",
}


@dataclass(frozen=True)
class Tls:
    """PEM files for encryption.

    Args:
        certificate, key: the server's own.
        clients: authorities; with them, only clients whose certificate one of them has signed are let in.
    """

    certificate: Path
    key: Path
    clients: Path | None = None


class RpcServer:
    """A gRPC server of the protocol and of gRPC's health protocol.

    Attributes:
        port: on which it listens.
    """

    def __init__(self, server: Any, port: int, stopping: asyncio.Event) -> None:
        self._server, self.port, self._stopping = server, port, stopping

    async def start(self) -> None:
        """Take connections."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Take no more on, and wait until what was accepted is answered, for `grace` seconds at most."""
        self._stopping.set()  # ends the streams that are idle, which would hold the grace to its end
        await self._server.stop(grace)


def serve_rpc(
    shelf: Repository,
    settings: Settings,
    *,
    host: str = "127.0.0.1",
    port: int = 8001,
    tls: Tls | None = None,
    tracing: Tracing = OFF,
    most_calls: int = 1000,
    most_connections: int = 1000,
    compression: str = "none",
    always_raw: bool = False,
    traffic: Traffic | None = None,
) -> RpcServer:
    """A server that listens, but answers only once it is started; call this inside the event loop that is to serve.

    Args:
        settings: `max_body_bytes` bounds one message, compressed or not.
        port: 0 for any that is free.
        most_calls: that may be under way at once, streams among them; further ones are refused, but for probes.
        most_connections: at a time; further ones are closed.
        compression: of answers: none, gzip or deflate; requests may come in any of them.
        always_raw: answer with raw tensors also where the request's came in typed, as Triton does.
        traffic: where answers are counted.

    Raises:
        UsageError: the port is taken, a file of `tls` can't be used, or there is no such compression.
    """
    if compression not in COMPRESSIONS:
        raise UsageError(f"the compression was {compression!r}; there are {', '.join(COMPRESSIONS)}")
    calls = Calls(shelf, settings, tracing, always_raw)
    server = grpc.aio.server(
        handlers=[_Door(calls, settings, most_calls, traffic or Traffic()).handlers(), Probes(calls).handlers()],
        options=_options(settings, most_connections),
        maximum_concurrent_rpcs=most_calls + SPARE_CALLS,
        compression=COMPRESSIONS[compression],
    )
    return RpcServer(
        server, _listen(server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}", tls), calls.stopping
    )


def _options(settings: Settings, most_connections: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_allowed_incoming_connections", most_connections),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.so_reuseport", 0),  # or a second server would quietly share the port
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.keepalive_time_ms", 60_000),  # a client that is gone is noticed
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # clients may ask more often than grpc allows
    ]


def _listen(server: Any, address: str, tls: Tls | None) -> int:
    try:
        if tls is None:
            return server.add_insecure_port(address)
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        roots = tls.clients.read_bytes() if tls.clients else None
        credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)
        return server.add_secure_port(address, credentials)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"gRPC can't listen at {address}: {error}; the port must be free and TLS files must be PEM"
        ) from error


# --- from the wire to the calls and back ------------------------------------------------------------------------


class _Door:
    """Lets calls in, parses their messages, and turns errors into statuses."""

    def __init__(self, calls: Calls, settings: Settings, most_calls: int, traffic: Traffic) -> None:
        self.calls, self.most_calls, self.traffic = calls, most_calls, traffic
        self.under_way = 0
        self.tokens = None if settings.tokens is None else Tokens(settings.tokens)

    def handlers(self) -> Any:
        """Every method of the service."""
        found = {name: self._handler(method) for name, method in inference().methods.items()}
        found |= {name: grpc.unary_unary_rpc_method_handler(self._refusal(why)) for name, why in UNSERVED.items()}
        return grpc.method_handlers_generic_handler(inference().service, found)

    def _handler(self, method: Method) -> Any:
        call = getattr(self.calls, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower())
        if method.takes_stream:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, call))
        return grpc.unary_unary_rpc_method_handler(self._unary(method, call))

    def _unary(self, method: Method, call: Callable[..., Awaitable[Any]]) -> Any:
        guarded = method.name not in OPEN

        async def answer(data: bytes, context: Any) -> bytes:
            if guarded and (why := self._unwelcome(context)):
                await self._abort(context, *why)
            self.under_way += guarded
            try:
                message = await call(_parse(method, data), context)
                self.traffic.gave("grpc", "OK")
                return message.SerializeToString()
            except Exception as error:  # noqa: BLE001  one bad request must not end the server
                failure = error
            finally:
                self.under_way -= guarded
            await self._abort(context, *_status(failure))
            raise AssertionError("abort always raises")

        return answer

    def _stream(self, method: Method, call: Callable[..., Awaitable[Any]]) -> Any:
        """Requests one after the other, each answered before the next is read; an error does not end the stream."""

        async def answers(requests: Any, context: Any) -> AsyncIterator[bytes]:
            if why := self._unwelcome(context):
                await self._abort(context, *why)
            self.under_way += 1
            try:
                async with aclosing(self._until_stopping(context)) as taken:
                    async for data in taken:
                        request, code = None, grpc.StatusCode.OK
                        try:
                            request = _parse(method, data)
                            message = await call(request, context)
                        except Exception as error:  # noqa: BLE001  as above
                            code, words = _status(error)
                            message = method.response(error_message=words)
                            message.infer_response.id = request.id if request else ""
                        self.traffic.gave("grpc", code.name)
                        yield message.SerializeToString()
            finally:
                self.under_way -= 1

        return answers

    async def _until_stopping(self, context: Any) -> AsyncGenerator[bytes, None]:
        """The messages of a stream, until the client ends it or the server stops."""
        stopping = asyncio.ensure_future(self.calls.stopping.wait())
        waiting = {stopping}
        try:
            while True:
                read = asyncio.ensure_future(context.read())
                waiting = {read, stopping}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not read.done():  # what was sent before may still be on its way here
                    await asyncio.wait({read}, timeout=LAST_SECONDS)
                if not read.done():
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
                if read.result() is grpc.aio.EOF:
                    return
                yield read.result()
        finally:
            for task in waiting:
                task.cancel()

    def _refusal(self, why: str) -> Any:
        async def refuse(data: bytes, context: Any) -> bytes:
            await self._abort(context, grpc.StatusCode.UNIMPLEMENTED, why)
            raise AssertionError("abort always raises")

        return refuse

    async def _abort(self, context: Any, code: grpc.StatusCode, words: str) -> None:
        self.traffic.gave("grpc", code.name)
        await context.abort(code, words)

    def _unwelcome(self, context: Any) -> tuple[grpc.StatusCode, str] | None:
        """Why a call is not let in: its caller has no token, or there is no room for it."""
        if self.tokens is not None and (words := _without_token(context, self.tokens)):
            return grpc.StatusCode.UNAUTHENTICATED, words
        if self.under_way >= self.most_calls:
            words = f"{self.under_way} calls are under way, the most that are taken at once; try again later"
            return grpc.StatusCode.RESOURCE_EXHAUSTED, words
        return None


def _without_token(context: Any, tokens: Tokens) -> str:
    """What a caller is told who has none of the tokens; nothing where it has one."""
    given = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), "")
    scheme, _, token = given.partition(" ")
    if scheme.lower() != "bearer":
        why = "a token is needed"
    elif tokens.admit(token.strip().encode("latin-1", "replace")):
        return ""
    else:
        why = "the token is not valid (any longer)"
    return f"{why}: send the metadata `authorization: Bearer TOKEN`"


def _parse(method: Method, data: bytes) -> Any:
    try:
        return method.request.FromString(data)
    except DecodeError as error:
        raise DataError(f"the {len(data)} bytes that were sent are no {method.request.DESCRIPTOR.name}") from error


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status of an error and its text, short enough to travel."""
    code = next((code for kind, code in STATUSES if isinstance(error, kind)), None)
    if code is None:
        log.error("an error of the server's own", exc_info=error)
        return grpc.StatusCode.INTERNAL, "an error of the server's own; its log has the details"
    if code is grpc.StatusCode.INTERNAL:
        log.warning("a request failed: %s", error)
    words = f"Request for unknown model: {error}" if code is grpc.StatusCode.NOT_FOUND else str(error)  # as Triton's
    text = words.encode("utf-8", "replace")
    return code, text.decode() if len(text) <= LONGEST else text[:LONGEST].decode("utf-8", "ignore") + " ..."
