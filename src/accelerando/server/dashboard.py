"""The dashboard: one page, its few files, and what it shows, as JSON and as a stream of events.

    dashboard = Dashboard(shelf)
    watching = asyncio.create_task(dashboard.watch())      # keeps the charts' last ten minutes
    if dashboard.takes(path): await dashboard(scope, receive, send)
    dashboard.close()                                      # before the server waits for its connections

The page works offline, and its policy lets it talk to this server only.  It and its files hold no secret and are for
everyone; the two paths under `/v2/dashboard/` tell about models, so they belong behind whatever guards those.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from accelerando.machine import installed_version
from accelerando.serve.status import BUCKETS, Status
from accelerando.server.goal_watch import judge, needed, read, to_json
from accelerando.server.recent import SMOOTH, SPAN, STEP, WINDOW, History, Point, Recent, quantile
from accelerando.server.repository import Entry, Repository

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

HERE = Path(__file__).parent / "dashboard"
STATE, STREAM = "/v2/dashboard/state", "/v2/dashboard/stream"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
GUARDS: Headers = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
PACE = 0.5  # seconds between events
VIEWERS = 32  # streams at a time
STALLED = 10.0  # seconds that a viewer may take to accept an event
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file of the page, as it is sent."""

    kind: bytes
    body: bytes
    tag: bytes


def assets() -> dict[str, Asset]:
    """The page at `/` and its files under `/dashboard/`."""
    found = {}
    for file in sorted(HERE.iterdir()):
        body = file.read_bytes()
        tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        path = "/" if file.name == "page.html" else f"/dashboard/{file.name}"
        found[path] = Asset(KINDS[file.suffix].encode(), body, tag.encode())
    return found


class Dashboard:
    """An ASGI app of the few paths of the dashboard.  Everything but the models runs on one event loop.

    Args:
        shelf: the models.
        pace: seconds between the events of a stream.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, shelf: Repository, *, pace: float = PACE, clock: Callable[[], float] = time.monotonic) -> None:
        self._shelf, self._pace, self._clock = shelf, pace, clock
        self._epoch = time.time() - clock()  # one for all points, so that time never goes back on the charts
        self._assets, self._version = assets(), installed_version("accelerando") or "unknown"
        self._histories: dict[str, History] = {}
        self._closing = asyncio.Event()
        self._viewers = 0
        self._warned: set[str] = set()

    def takes(self, path: str) -> bool:
        """Whether a path is one of its own."""
        return path in self._assets or path in (STATE, STREAM)

    def close(self) -> None:
        """End every stream, and `watch`; call it on the event loop."""
        self._closing.set()

    async def watch(self) -> None:
        """Look at the models every two seconds until it is closed, so that a page that opens has its charts."""
        while not self._closing.is_set():
            self.look()
            await _soon(self._closing, STEP)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        path, method = scope["path"], scope["method"]
        if not self.takes(path):
            await _reply(send, 404, {"error": f"there is nothing at {path}"})
        elif method not in ("GET", "HEAD"):
            await _reply(send, 405, {"error": f"{path} takes GET, but got {method}"}, [(b"allow", b"GET, HEAD")])
        elif path == STREAM and method == "GET":
            await self._stream(receive, send)
        elif path in (STATE, STREAM):
            await _reply(send, 200, self.state(), head=method == "HEAD")
        else:
            await self._send_asset(self._assets[path], scope, send)

    # --- what is shown ------------------------------------------------------------------------------------------

    def look(self) -> dict[str, Status | str]:
        """The status of every model, or why there is none; the histories note it."""
        found: dict[str, Status | str] = {}
        for entry in self._shelf.index():
            if entry.name not in found or entry.state == "READY":
                found[entry.name] = self._status(entry)
        now = self._clock()
        for name, status in found.items():
            if isinstance(status, Status):
                self._histories.setdefault(name, History()).note(now, now + self._epoch, status)
        for gone in self._histories.keys() - found.keys():
            del self._histories[gone]
        return found

    def state(self, since: float = -math.inf) -> dict[str, Any]:
        """Everything that the page shows; frozen data in it is sent as objects of its fields.

        Args:
            since: of the charts' points, those later than this, in seconds since the epoch.

        `models` holds for each its `name`, its `state` and `reason` (of one that is ready, why its bundle could not
        be loaded anew), and where it is ready its `status` (the fields of `Status`), `goal` (its bounds apart),
        `recent` (of the last minute), `outlook` (the goal held against that), and `points`, each a list in the order
        of `columns`.
        """
        found = self.look()
        entries = {entry.name: entry for entry in self._shelf.index()}
        return {
            "at": self._clock() + self._epoch,
            "version": self._version,
            "ready": self._shelf.ready,
            "window": WINDOW,
            "smooth": SMOOTH,
            "span": SPAN,
            "columns": Point._fields,
            "models": [self._model(name, told, entries.get(name), since) for name, told in sorted(found.items())],
        }

    def _status(self, entry: Entry) -> Status | str:
        if entry.state != "READY":
            return entry.reason
        try:
            return self._shelf.find(entry.name).status()
        except Exception as error:
            if entry.name not in self._warned:
                self._warned.add(entry.name)
                log.warning("the dashboard got no status of %r: %s", entry.name, error, exc_info=True)
            return f"it did not tell its status: {error}"

    def _model(self, name: str, told: Status | str, entry: Entry | None, since: float) -> dict[str, Any]:
        if isinstance(told, str):
            state = entry.state if entry and entry.state != "READY" else "UNAVAILABLE"
            return {"name": name, "state": state, "reason": told}
        history = self._histories[name]
        recent = history.recent(self._clock(), told)
        goal = read(told.goal)
        return {
            "name": name,
            "state": "READY",
            "reason": entry.reason if entry else "",
            "status": told,
            "goal": {**to_json(goal, told.goal), "needed": needed(goal)},
            "recent": _recent(recent),
            "outlook": judge(goal, told, recent),
            "points": [point for point in history.points if point.at > since],
        }

    # --- how it is sent -----------------------------------------------------------------------------------------

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Events until the viewer leaves, stalls, or the server closes."""
        if self._viewers >= VIEWERS or self._closing.is_set():
            why = "the server is closing" if self._closing.is_set() else f"{VIEWERS} pages watch already; close one"
            await _reply(send, 503, {"error": why}, [(b"retry-after", b"5")])
            return
        self._viewers += 1
        leaving = asyncio.ensure_future(_left(receive))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await _start(send, 200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")])
            await self._send_events(send, leaving, closing)
        finally:
            self._viewers -= 1
            for task in (leaving, closing):
                task.cancel()
            await asyncio.gather(leaving, closing, return_exceptions=True)

    async def _send_events(self, send: Send, *ends: asyncio.Future[Any]) -> None:
        since = -math.inf
        while not any(end.done() for end in ends):
            state = self.state(since)
            since = max([p[0] for m in state["models"] for p in m.get("points", ())], default=since)
            message = {"type": "http.response.body", "body": b"data: " + _bytes(state) + b"\n\n", "more_body": True}
            try:
                await asyncio.wait_for(send(message), STALLED)
            except asyncio.TimeoutError:  # it does not read: its place is for others
                return
            except OSError:  # it is gone
                return
            await asyncio.wait(ends, timeout=self._pace, return_when=asyncio.FIRST_COMPLETED)
        if not ends[0].done():
            await send({"type": "http.response.body", "body": b"event: end\ndata: {}\n\n", "more_body": False})

    async def _send_asset(self, asset: Asset, scope: MutableMapping[str, Any], send: Send) -> None:
        known = b",".join(value for key, value in scope["headers"] if key == b"if-none-match")
        same = asset.tag in [tag.strip().removeprefix(b"W/") for tag in known.split(b",")]
        headers = [(b"content-type", asset.kind), (b"etag", asset.tag), (b"cache-control", b"no-cache")]
        body = b"" if same or scope["method"] == "HEAD" else asset.body
        if not same:
            headers.append((b"content-length", str(len(asset.body)).encode()))
        await _start(send, 304 if same else 200, headers)
        await send({"type": "http.response.body", "body": body})


async def _soon(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, and no longer than that."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        return


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *GUARDS]})


async def _reply(send: Send, status: int, data: Any, headers: Headers | None = None, *, head: bool = False) -> None:
    body = _bytes(data)
    kind = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    await _start(send, status, [*kind, (b"content-length", str(len(body)).encode()), *(headers or [])])
    await send({"type": "http.response.body", "body": b"" if head else body})


def _bytes(data: Any) -> bytes:
    """Data as JSON.  Figures are finite but for rare ones, and only then is all of it walked through here."""
    try:
        return json.dumps(data, allow_nan=False, separators=(",", ":"), default=vars).encode()
    except ValueError:
        return json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).encode()


def _recent(recent: Recent) -> dict[str, Any]:
    """The last minute, with its histograms' quantiles in place of their counts."""
    told = dict(vars(recent))
    for name in ("queued", "computed"):
        histogram = getattr(recent, name)
        told[name] = {"p50": quantile(histogram, 0.5), "p99": quantile(histogram, 0.99), "most": BUCKETS[-1]}
    return {**told, "share": recent.share}


def _finite(value: Any) -> Any:
    """Data as JSON can hold it: figures that are not finite become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return _finite(dict(vars(value))) if dataclasses.is_dataclass(value) else value
