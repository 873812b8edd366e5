"""Connections that don't dawdle: who has not sent the head of a request within some seconds is hung up on.

uvicorn has no limit for that, and a few thousand slow clients would hold every connection there may be.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0


class PromptProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with a limit to how long the head of a request may take."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()

    def on_message_begin(self) -> None:
        if not self._hurry:
            self._wait_for_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    _hurry: asyncio.TimerHandle | None = None

    def _wait_for_head(self) -> None:
        self._hurry = self.loop.call_later(HEAD_SECONDS, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._hurry:
            self._hurry.cancel()
            self._hurry = None

    def _hang_up(self) -> None:
        self._hurry = None
        transport: Any = self.transport
        if transport is not None and not transport.is_closing():
            transport.close()
