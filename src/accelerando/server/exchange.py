"""The two halves of an HTTP exchange: a body that comes in within its limits, and an answer that goes out."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any

from accelerando.errors import (
    AccelerandoError,
    BundleError,
    ClosedError,
    DeadlineError,
    MissingExtraError,
    OverloadedError,
    RefusalError,
    RowsError,
    UnknownModelError,
    UsageError,
)
from accelerando.server.wire_json import text_of

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]
Headers = Mapping[bytes, bytes]
JSON = b"application/json"
BINARY = b"application/octet-stream"
ALIGNED = 16  # bytes; a tensor that begins at a multiple of it can be used where it lies
COMPRESSION = 1  # zlib's level: the least work
STATUSES: tuple[tuple[type[AccelerandoError], int], ...] = (
    (UnknownModelError, 404),
    (MissingExtraError, 501),
    (RefusalError, 501),
    (UsageError, 400),
    (BundleError, 400),
    (OverloadedError, 503),
    (ClosedError, 503),
    (DeadlineError, 504),
    (RowsError, 500),
)
RETRY_AFTER = (b"retry-after", b"1")  # seconds, told to who comes at a bad time
log = logging.getLogger(__name__)
_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}


class ReplyError(UsageError):
    """The caller's mistake, with the status of its answer and headers that go with it."""

    def __init__(self, status: int, words: str, headers: Iterable[Header] = ()) -> None:
        super().__init__(words)
        self.status, self.words, self.headers = status, words, list(headers)


class GoneError(CancelledError):
    """The client went away before it was answered."""


# --- in ---------------------------------------------------------------------------------------------------------


async def read_body(headers: Headers, receive: Receive, *, most: int, seconds: float, offset: int = 0) -> memoryview:
    """The whole body, decompressed; the byte at `offset` of it is aligned in memory.

    Args:
        most: bytes that it may have, as it comes and as it is decompressed.
        seconds: within which it must have come.

    Raises:
        ReplyError: 400, 408, 413 or 415, with the reason.
        GoneError: the client went away.
    """
    declared = _length(headers)
    if declared is not None and declared > most:
        raise ReplyError(413, f"the body has {declared} bytes, but at most {most} are taken here")
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding not in (*_WINDOWS, b"identity", b""):
        words = f"the body's encoding is {coding.decode('latin-1')[:60]!r}, but only gzip and deflate are taken"
        raise ReplyError(415, words, [(b"accept-encoding", b"gzip, deflate")])
    chunks = await _within(seconds, receive, most)
    came = sum(map(len, chunks))
    if declared not in (None, came):
        raise ReplyError(400, f"Content-Length is {declared}, but {came} bytes came")
    if coding in _WINDOWS:
        chunks = [await asyncio.to_thread(_inflate, b"".join(chunks), _WINDOWS[coding], most)]
    pad = -offset % ALIGNED
    return memoryview(b"".join((bytes(pad), *chunks)))[pad:]


def _length(headers: Headers) -> int | None:
    given = headers.get(b"content-length")
    if given is None:
        return None
    if not given.isdigit() or len(given) > 18:
        raise ReplyError(400, f"Content-Length must be a whole number, but is {given.decode('latin-1')[:60]!r}")
    return int(given)


async def _within(seconds: float, receive: Receive, most: int) -> list[bytes]:
    """The chunks, or 408 after this time.  (`asyncio.timeout` needs Python 3.11, and `wait_for` a task per request.)"""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        return await _chunks(receive, most)
    except asyncio.CancelledError:
        if not late:
            raise
        if hasattr(task, "uncancel"):  # from Python 3.11 on
            task.uncancel()
        words = f"the body did not come within {seconds:g} seconds"
        raise ReplyError(408, words, [(b"connection", b"close")]) from None
    finally:
        timer.cancel()


async def _chunks(receive: Receive, most: int) -> list[bytes]:
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > most:
            words = f"the body has more than the {most} bytes that are taken here"
            raise ReplyError(413, words, [(b"connection", b"close")])  # for there may be no end to it
        chunks.append(chunk)
        more = message.get("more_body", False)
    return chunks


def _inflate(data: bytes, window: int, most: int) -> bytes:
    """Decompressed, never holding more than `most` bytes of it."""
    inflater = zlib.decompressobj(window)
    try:
        body = inflater.decompress(data, most + 1)
    except zlib.error as error:
        raise ReplyError(400, f"the body can't be decompressed: {error}") from error
    if len(body) > most:
        raise ReplyError(413, f"the body has more than {most} bytes when it is decompressed, the most that are taken")
    if not inflater.eof or inflater.unused_data:
        raise ReplyError(400, f"the compressed body {'goes on after its' if inflater.eof else 'stops before its'} end")
    return body


# --- out --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer: its status, body, content type, and further headers."""

    status: int
    body: bytes
    kind: bytes = JSON
    headers: tuple[Header, ...] = ()

    async def deliver(self, send: Send, *, head: bool = False) -> None:
        """Send it; without its body where only the head was asked for."""
        lines = [(b"content-type", self.kind), (b"content-length", str(len(self.body)).encode()), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": lines})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


def as_json(value: Any, status: int = 200) -> Reply:
    """An answer that is a value in JSON."""
    return Reply(status, text_of(value))


def as_error(status: int, words: str, headers: Iterable[Header] = ()) -> Reply:
    """An error as every client of the protocol reads it: `{"error": words}`."""
    return Reply(status, text_of({"error": words}), headers=tuple(headers))


def reply_to(error: AccelerandoError) -> Reply:
    """The answer that an error of ours is to its client."""
    if isinstance(error, ReplyError):
        return as_error(error.status, error.words, error.headers)
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), 500)
    words = f"Request for unknown model: {error}" if status == 404 else str(error)  # as Triton begins it
    if status == 500:
        log.warning("a request failed: %s", error)
    return as_error(status, words, [RETRY_AFTER] if status == 503 else [])


async def packed(reply: Reply, asked: Headers, compress_from: int) -> Reply:
    """The answer, compressed where it has this many bytes and the client takes that."""
    coding = coding_for(asked.get(b"accept-encoding", b""), reply.kind) if len(reply.body) >= compress_from else None
    if coding is None:
        return reply
    body = await asyncio.to_thread(_deflate, reply.body, _WINDOWS[coding])
    more = ((b"content-encoding", coding), (b"vary", b"accept-encoding"))
    return replace(reply, body=body, headers=(*reply.headers, *more))


def coding_for(accepted: bytes, kind: bytes) -> bytes | None:
    """How to compress for a client that takes these codings, None for not at all.

    Raw tensors hardly shrink, and cost time that the model needs: they are compressed only for a client that names one
    coding alone, and so means it.  A list of all that it could read is what every library sends unasked.
    """
    wishes = [part.strip().lower().partition(b";") for part in accepted.split(b",")]
    names = [name.strip() for name, _, rest in wishes if name and rest.replace(b" ", b"") not in (b"q=0", b"q=0.0")]
    if kind == BINARY and len(names) != 1:
        return None
    return next((name for name in (b"gzip", b"deflate") if name in names), None)


def _deflate(body: bytes, window: int) -> bytes:
    packer = zlib.compressobj(COMPRESSION, zlib.DEFLATED, window)
    return packer.compress(body) + packer.flush()
