"""Which answers the server gave, by protocol and status: what is bad, or has no token, comes to no model's count.

What a connection answers by itself, before there is a request (`connections`), is not among them.
"""

from __future__ import annotations

from collections import Counter

from accelerando.server.exchange import App, Message, Receive, Scope, Send


class Traffic:
    """Counts answers.  For one event loop.

    Attributes:
        answers: how many, by (protocol, status); of gRPC the status is its name, and each answer of a stream counts.
    """

    def __init__(self) -> None:
        self.answers: Counter[tuple[str, str]] = Counter()

    def gave(self, protocol: str, status: object) -> None:
        """An answer was given."""
        self.answers[protocol, str(status)] += 1

    def of(self, app: App) -> App:
        """An ASGI app whose answers are counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            async def sent(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.gave("http", message["status"])
                await send(message)

            await app(scope, receive, sent)

        return counted
