"""Connections that are few enough, don't dawdle, and send what can be read.

uvicorn has no limit for how long the head of a request may take or how large it may be, and a few thousand slow clients
would hold every connection there may be; to who is one too many, or is not understood, it answers in words that are not
of the protocol.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from accelerando.server.wire_json import text_of

MOST_HEAD = 64 * 2**10  # bytes of a head, or of a trailer that has no end yet: its parser takes time by their square
SPARE_FILES = 100  # that the server opens for all else
log = logging.getLogger(__name__)


def that_fit(most: int, most_rpc: int) -> tuple[int, int]:
    """These many connections, of HTTP and of gRPC, or as many as this process may have open after asking for more."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return most, most_rpc
    needed = most + most_rpc + SPARE_FILES
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files not in (hard, resource.RLIM_INFINITY):
        more = needed if hard == resource.RLIM_INFINITY else hard
        if more > files:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
                files = more
            except (OSError, ValueError) as error:
                log.warning("this process may have %d files open, and could not have more: %s", files, error)
    if files == resource.RLIM_INFINITY or files >= needed:
        return most, most_rpc
    share = max(files - SPARE_FILES, 2) / (most + most_rpc)
    fit = max(int(most * share), 1), max(int(most_rpc * share), 1) if most_rpc else 0
    words = "%d connections of HTTP and %d of gRPC are taken, not %d and %d: this process may have %d files open; raise"
    log.warning(f"{words} `ulimit -n`", *fit, most, most_rpc, files)
    return fit


def _last_words(status: str, words: str, *lines: str) -> bytes:
    """An answer after which the connection is closed."""
    body = text_of({"error": words})
    head = [f"HTTP/1.1 {status}", "content-type: application/json", "connection: close", *lines]
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


FULL = _last_words(
    "503 Service Unavailable", "the server has as many connections as it takes; try again later", "retry-after: 1"
)
GARBLED = _last_words("400 Bad Request", "what came can't be read as HTTP/1.1; the connection is closed")
TOO_LONG = _last_words(
    "431 Request Header Fields Too Large",
    f"the head of a request, or its trailer, may have {MOST_HEAD} bytes, but more came; send less",
)


def protocol(most: int, *, head_seconds: float, idle_seconds: float, stall_seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits.  A connection to which no answer is owed always has a time to its end.

    Args:
        most: connections at a time.
        head_seconds: within which a new connection must begin a request, and the head of a request must have come.
        idle_seconds: after an answer, within which the next request must begin; what comes of a body that the answer
            did not wait for gives no more time.
        stall_seconds: after which a client that reads nothing of what it is sent is dropped; one that is slow is not.
    """
    pace = min(head_seconds, idle_seconds, stall_seconds) / 4  # of looks at the clock; a timer for each request costs

    class Bounded(HttpToolsProtocol):
        _next_look: asyncio.TimerHandle | None = None
        _until = math.inf  # on the loop's clock, when it is hung up on
        _unsent, _sent_at = 0, 0.0  # bytes that wait for the client to read, and when there were last fewer of them
        _within_head = False
        _refused = False  # whether nothing is read any more
        _told = False  # whether the parser could tell of the end of a head, or of a body, in the latest bytes
        _mute_bytes = 0  # that came since it last could
        url = b""

        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self._owed: deque[Any] = deque()  # requests to be answered, in turn; uvicorn knows only the newest

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(FULL)
                transport.close()
            else:
                self._allow(head_seconds)
                self._sent_at = self.loop.time()  # of TLS, something may wait to be sent by now
                self._look()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            self._told = False
            self._mute_bytes += len(data)
            self._parse(data)
            if self._told:
                self._mute_bytes = 0
            elif self._mute_bytes > MOST_HEAD and not self._refused:
                self._refuse(TOO_LONG)

        def _parse(self, data: bytes) -> None:
            try:
                while data:
                    try:
                        self.parser.feed_data(data)
                        return
                    except httptools.HttpParserUpgrade as upgrade:  # it skips the body, as of another protocol
                        data = self._head_without_upgrade() + data[upgrade.args[0] :]
            except httptools.HttpParserError:
                self.logger.warning("Invalid HTTP request received.")
                self._refuse(TOO_LONG if self._head_size() > MOST_HEAD else GARBLED)

        def _head_size(self) -> int:
            return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers or ())

        def _head_without_upgrade(self) -> bytes:
            """The head that was just read, to be read as one that asks for no other protocol: none is offered."""
            version, method = self.parser.get_http_version().encode(), self.parser.get_method()
            lines = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
            return b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", b""])

        def on_message_begin(self) -> None:
            self._within_head = True
            if not self._owed:
                self._allow(head_seconds)
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._told = True
            if self._head_size() > MOST_HEAD:
                raise ValueError("too long")
            if self.parser.should_upgrade():
                if self.parser.get_method() == b"CONNECT":
                    raise ValueError("there are no tunnels here")
                return  # it comes again
            super().on_headers_complete()
            self._owed.append(self.cycle)
            self._within_head = False
            self._allow(math.inf)

        def on_body(self, body: bytes) -> None:
            self._told = True
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._told = True
            if not self.parser.should_upgrade():
                super().on_message_complete()

        def on_response_complete(self) -> None:
            self._owed.popleft()
            super().on_response_complete()
            self._unset_keepalive_if_required()  # any byte would stop uvicorn's own clock
            if not self._owed:
                self._allow(head_seconds if self._within_head else idle_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._next_look:
                self._next_look.cancel()
            for cycle in self._owed:
                self._let_go(cycle)
            super().connection_lost(exc)

        def _refuse(self, answer: bytes) -> None:
            """Read no further, and hang up with this answer; what is owed to requests that came whole is given first.

            Then the answer is left out: it would be read as that to one of them.
            """
            self._refused = True
            newest = self._owed[-1] if self._owed else None
            if newest and newest.more_body and not newest.response_started:  # it is this request that can't be read
                self._let_go(self._owed.pop())
                if self.pipeline:
                    self.pipeline.popleft()
            if self._owed:
                self._owed[-1].keep_alive = False
            elif not self.transport.is_closing():
                self.transport.write(answer)
                if self.transport.can_write_eof():
                    self.transport.write_eof()
                self._allow(head_seconds)  # until the client has read it: to close at once would reset what it sends

        @staticmethod
        def _let_go(cycle: Any) -> None:
            """Let a request know that nobody waits for its answer."""
            cycle.disconnected = True
            cycle.message_event.set()

        def _allow(self, seconds: float) -> None:
            self._until = self.loop.time() + seconds

        def resume_writing(self) -> None:
            self._sent_at = self.loop.time()
            super().resume_writing()

        def _look(self) -> None:
            """Hang up on who holds the connection for nothing, and look again soon."""
            now, unsent, closing = self.loop.time(), self.transport.get_write_buffer_size(), self.transport.is_closing()
            if unsent < self._unsent or not (unsent or closing):
                self._sent_at = now
            self._unsent = unsent
            if now > self._sent_at + stall_seconds:
                self.transport.abort()  # to close it would wait until all is sent
            elif now > self._until and not closing:
                self.transport.close()
            self._next_look = self.loop.call_later(pace, self._look)

    return Bounded
