"""Connections that are few enough and don't dawdle.

uvicorn has no limit for how long the head of a request may take, and a few thousand slow clients would hold every
connection there may be; to who is one too many it answers in words that are not of the protocol.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

BODY = b'{"error": "the server has as many connections as it takes; try again later"}'
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
)


def protocol(most: int, head_seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with these limits.

    Args:
        most: connections at a time.
        head_seconds: within which the head of a request must have come, from its first byte or from the connection.
    """

    class Bounded(HttpToolsProtocol):
        _hurry: asyncio.TimerHandle | None = None
        _within_head = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(FULL)
                transport.close()
            else:
                self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._within_head and not self._hurry:  # most heads come as a whole, and need no timer
                self._wait_for_head()

        def on_message_begin(self) -> None:
            self._within_head = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._within_head = False
            self._stop_waiting()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._hurry = self.loop.call_later(head_seconds, self._hang_up)

        def _stop_waiting(self) -> None:
            if self._hurry:
                self._hurry.cancel()
                self._hurry = None

        def _hang_up(self) -> None:
            self._hurry = None
            transport: Any = self.transport
            if transport is not None and not transport.is_closing():
                transport.close()

    return Bounded
