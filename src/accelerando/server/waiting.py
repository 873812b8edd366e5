"""Waiting for the runtime's answer while an eye is kept on the client."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import CancelledError, Future

from accelerando.errors import ClosedError
from accelerando.serve.tickets import Answer
from accelerando.server.exchange import GoneError, Receive

UNWATCHED = 0.01  # seconds: who is answered sooner needs no eye kept on them, which costs a task
log = logging.getLogger(__name__)


async def result_of(future: Future[Answer], receive: Receive) -> Answer:
    """What the runtime answers; cancelled, so that its rows leave the queue, if the client goes away meanwhile.

    Raises:
        GoneError: the client went away.
        ServingError: the runtime did not answer.
    """
    if not future.done():
        loop, woken = asyncio.get_running_loop(), woken_by(future)
        watchers: list[asyncio.Task[None]] = []

        def watch() -> None:
            watchers.append(loop.create_task(_depart(receive, woken)))

        timer = loop.call_later(UNWATCHED, watch)
        try:
            await woken
        finally:  # also where the server is closing, and cancels us
            timer.cancel()
            for watcher in watchers:
                watcher.cancel()
            if not future.done():
                future.cancel()
        if woken.result() == "gone":
            raise GoneError
    try:
        return future.result()
    except CancelledError as error:
        raise ClosedError("the server is closing, and dropped the request") from error


def woken_by(future: Future[Answer]) -> asyncio.Future[str | None]:
    """A future of the running event loop that has a result (None) as soon as the runtime has answered."""
    loop, here = asyncio.get_running_loop(), threading.get_ident()
    woken: asyncio.Future[str | None] = loop.create_future()

    def settle() -> None:
        if not woken.done():
            woken.set_result(None)

    def wake(_: Future[Answer]) -> None:
        try:
            if threading.get_ident() == here:  # the loop is awake
                settle()
            else:
                loop.call_soon_threadsafe(settle)
        except RuntimeError:
            log.debug("an answer came after the event loop had been closed")

    future.add_done_callback(wake)
    return woken


async def _depart(receive: Receive, woken: asyncio.Future[str | None]) -> None:
    """Wait until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not woken.done():
        woken.set_result("gone")
