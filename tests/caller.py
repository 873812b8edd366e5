"""Requests straight at an ASGI app, without a network: the test chooses every chunk and every moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerando.server.exchange import App


@dataclass(frozen=True)
class Got:
    """An answer; `status` 0 where the app sent none, because its client was gone."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        value = self.json
        assert isinstance(value["error"], str)
        assert value["error"]
        return value["error"]


class Caller:
    """One client of an app.

    Attributes:
        left: set it, and the client has gone away.
        waits: is set as soon as the app waits for more than was sent.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.left = asyncio.Event()
        self.waits = asyncio.Event()

    async def call(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        headers: Mapping[str, str] | None = None,
        *,
        ends: bool = True,
    ) -> Got:
        """The answer to one request.

        Args:
            body: in one piece, or in several.
            ends: whether the last piece says that it is the last.
        """
        pieces = [body] if isinstance(body, bytes) else list(body)
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages[-1]["more_body"] = not ends
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            self.waits.set()
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        lines = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "headers": lines, "query_string": b""}
        await self.app(scope, receive, send)
        if not sent:
            return Got(0, {}, b"")
        start, *rest = sent
        assert start["type"] == "http.response.start"
        assert [m["type"] for m in rest] == ["http.response.body"]
        got = {name.decode("latin-1"): value.decode("latin-1") for name, value in start["headers"]}
        return Got(start["status"], got, rest[0]["body"])


def call(app: App, *args: Any, **kwargs: Any) -> Got:
    """One request of one client, in an event loop of its own."""
    return run(Caller(app).call(*args, **kwargs))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns; it is an error if it takes a minute."""

    async def bounded() -> Any:
        return await asyncio.wait_for(work, 60)

    return asyncio.run(bounded())
