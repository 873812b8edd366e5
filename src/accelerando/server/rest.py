"""The Open Inference Protocol, version 2, over HTTP: a plain ASGI app, for the hot path has no time for a framework.

    uvicorn.run(Access(Rest(shelf, settings), settings))

Of Triton's extensions it has binary tensors, model repository, model configuration, statistics, and of the schedule
policy `timeout` and `priority`; of our own `min_quality`, and the goal of a model.  `openapi.py` lists all routes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from accelerando.errors import AccelerandoError, ClosedError, DataError, UnknownModelError
from accelerando.serve.tickets import Answer
from accelerando.server.access import Settings
from accelerando.server.descriptions import (
    index_entry,
    model_config,
    model_metadata,
    model_statistics,
    server_metadata,
)
from accelerando.server.exchange import (
    BINARY,
    GoneError,
    Headers,
    Receive,
    Reply,
    ReplyError,
    Scope,
    Send,
    as_error,
    as_json,
    packed,
    read_body,
    reply_to,
)
from accelerando.server.inference import Asked, read_request, write_answer
from accelerando.server.openapi import docs_page, document
from accelerando.server.repository import Repository, Served
from accelerando.server.tracing import OFF, Trace, Tracing
from accelerando.server.waiting import result_of
from accelerando.server.wire_json import read_json

LARGE = 256 * 2**10  # bytes of JSON from which on it is read and written beside the event loop
UNOFFERED = ("systemsharedmemory", "cudasharedmemory", "trace", "logging")  # extensions that clients may know
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What a handler needs of a request; `name` and `version` are those of the model in its path."""

    headers: Headers
    receive: Receive
    name: str = ""
    version: str | None = None


Handler = Callable[[Request], Awaitable[Reply]]
NOTHING: Mapping[str, Handler] = {}


class Rest:
    """The ASGI app.

    Args:
        shelf: the models.
        settings: limits, and the server's name.
        tracing: of the requests for inference.
        pages: whether the dashboard and the metrics stand before it, so that its document lists them.
    """

    def __init__(
        self, shelf: Repository, settings: Settings | None = None, *, tracing: Tracing = OFF, pages: bool = False
    ) -> None:
        self.shelf = shelf
        self.settings = settings or Settings()
        self.tracing = tracing
        self.pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _aside(scope["type"], receive, send)
            return
        try:
            reply = await self._answer(scope, receive)
        except GoneError:
            return  # nobody is there to be answered
        except AccelerandoError as error:
            reply = reply_to(error)
        except Exception:
            log.exception("an error of the server's own at %s %s", scope["method"], scope["path"])
            reply = as_error(500, "an error of the server's own; its log has the details")
        await reply.deliver(send, head=scope["method"] == "HEAD")

    # --- routes

    async def _answer(self, scope: Scope, receive: Receive) -> Reply:
        method, path = scope["method"], scope["path"]
        methods, name, version = self._find(path)
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            offered = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            words = f"{method[:20]} is not offered at {path[:200]}, but {offered}"
            raise ReplyError(405, words, [(b"allow", offered.encode())])
        return await handler(Request(dict(scope["headers"]), receive, name, version))

    def _find(self, path: str) -> tuple[Mapping[str, Handler], str, str | None]:
        """The methods that a path has, and the model that it names."""
        parts = path.removesuffix("/").split("/")[1:]
        name, methods = "", NOTHING
        version: str | None = None
        match parts:
            case ["v2", "models", "stats"]:
                methods = {"GET": self._all_statistics}
            case ["v2", "models", name, "versions", version, *rest] if name and version:
                methods = self._of_model(rest)
            case ["v2", "models", name, "goal"] if name:
                methods = {"GET": self._goal, "PUT": self._set_goal}
            case ["v2", "models", name, *rest] if name:
                methods = self._of_model(rest)
            case ["v2", "repository", "models", name, "load"] if name:
                methods = {"POST": self._load}
            case ["v2", "repository", "models", name, "unload"] if name:
                methods = {"POST": self._unload}
            case _:
                methods = self._of_server(parts)
        if not methods:
            raise ReplyError(404, f"there is nothing at {path[:200]}; /openapi.json lists what there is")
        return methods, name, version

    def _of_server(self, parts: list[str]) -> Mapping[str, Handler]:
        match parts:
            case ["v2"]:
                return {"GET": self._server}
            case ["v2", "health", "live"]:
                return {"GET": self._live}
            case ["v2", "health", "ready"]:
                return {"GET": self._ready}
            case ["v2", "repository", "index"]:
                return {"POST": self._index}
            case ["openapi.json"]:
                return {"GET": self._document}
            case ["docs"]:
                return {"GET": self._docs}
            case ["v2", extension, *_] if extension in UNOFFERED:
                raise ReplyError(501, f"the extension {extension!r} is not offered; tensors go in the body")
        return {}

    def _of_model(self, rest: list[str]) -> Mapping[str, Handler]:
        match rest:
            case []:
                return {"GET": self._model}
            case ["infer"]:
                return {"POST": self._infer}
            case ["ready"]:
                return {"GET": self._model_ready}
            case ["stats"]:
                return {"GET": self._statistics}
            case ["config"]:
                return {"GET": self._config}
        return {}

    # --- inference

    async def _infer(self, request: Request) -> Reply:
        with self.tracing.request(request.name, "http", request.headers.items()) as trace:
            return await self._traced(request, trace)

    async def _traced(self, request: Request, trace: Trace) -> Reply:
        served, settings, headers = self.shelf.find(request.name, request.version), self.settings, request.headers
        _check_kind(headers)
        header = _header_length(headers)
        most = settings.max_body_bytes if header is not None else min(settings.max_body_bytes, settings.max_json_bytes)
        offset = header or 0
        body = await read_body(headers, request.receive, most=most, seconds=settings.body_seconds, offset=offset)
        size = len(body) if header is None else min(header, len(body))
        if size > settings.max_json_bytes:
            words = f"the JSON has {size} bytes, but at most {settings.max_json_bytes} are taken; send binary tensors"
            raise ReplyError(413, words)
        what = (body, header, served.signature, settings)
        asked = await asyncio.to_thread(read_request, *what) if size > LARGE else read_request(*what)
        wishes = asked.wishes
        ticket = served.submit_soon(
            asked.leaves, asyncio.get_running_loop().call_soon,
            seconds=wishes.seconds, min_quality=wishes.min_quality, priority=wishes.priority,
        )  # fmt: skip
        answer = await result_of(ticket.future, request.receive)
        trace.answered(answer.why, ticket.rows, late=time.monotonic() > ticket.deadline)
        return await self._reply(request, served, asked, answer)

    async def _reply(self, request: Request, served: Served, asked: Asked, answer: Answer) -> Reply:
        what = (request.name, served.signature, asked, answer)
        written = sum(answer.leaves[number].nbytes for number, raw in asked.outputs if not raw)
        text, pieces = await asyncio.to_thread(write_answer, *what) if written > LARGE else write_answer(*what)
        if not any(raw for _, raw in asked.outputs):
            reply = Reply(200, text)
        else:
            length = ((b"inference-header-content-length", str(len(text)).encode()),)
            parts = [piece if isinstance(piece, bytes) else piece.data for piece in pieces]
            reply = Reply(200, b"".join([text, *parts]), BINARY, length)
        return await packed(reply, request.headers, self.settings.compress_from)

    # --- the server

    async def _server(self, request: Request) -> Reply:
        return as_json(server_metadata(self.settings.server_name))

    async def _live(self, request: Request) -> Reply:
        return as_json({"live": True})

    async def _ready(self, request: Request) -> Reply:
        if self.shelf.ready:
            return as_json({"ready": True})
        why = "a model is loading, or has no rung that can run, or the server is closing"
        return as_json({"ready": False, "error": why}, 503)

    async def _document(self, request: Request) -> Reply:
        return await packed(
            as_json(document(self.settings, self.shelf, pages=self.pages)),
            request.headers,
            self.settings.compress_from,
        )

    async def _docs(self, request: Request) -> Reply:
        return Reply(200, docs_page(), b"text/html; charset=utf-8", PAGE_HEADERS)

    # --- models

    async def _model(self, request: Request) -> Reply:
        served = self.shelf.find(request.name, request.version)
        return as_json(model_metadata(request.name, self.shelf.versions(request.name), served.signature))

    async def _model_ready(self, request: Request) -> Reply:
        try:
            if self.shelf.find(request.name, request.version).ready:
                return as_json({"name": request.name, "ready": True})
            why = "none of its rungs can run"
        except ClosedError as error:
            why = str(error)
        return as_json({"name": request.name, "ready": False, "error": why}, 503)

    async def _config(self, request: Request) -> Reply:
        served = self.shelf.find(request.name, request.version)
        return as_json(model_config(request.name, served.signature, self.settings.max_rows))

    async def _statistics(self, request: Request) -> Reply:
        served = self.shelf.find(request.name, request.version)
        version = request.version or self.shelf.versions(request.name)[-1]
        return as_json({"model_stats": [model_statistics(request.name, version, served.status())]})

    async def _all_statistics(self, request: Request) -> Reply:
        found = []
        for entry in self.shelf.index():
            try:
                status = self.shelf.find(entry.name, entry.version).status()
            except (ClosedError, UnknownModelError):
                continue  # not loaded, or not any longer
            found.append(model_statistics(entry.name, entry.version, status))
        return as_json({"model_stats": found})

    async def _goal(self, request: Request) -> Reply:
        return as_json({"name": request.name, "goal": self.shelf.find(request.name).status().goal})

    async def _set_goal(self, request: Request) -> Reply:
        goal = (await self._small(request, ("goal",))).get("goal")
        if not isinstance(goal, str):
            raise DataError('the body must be like {"goal": "p99 <= 20ms"}')
        self.shelf.set_goal(request.name, goal)
        return as_json({"name": request.name, "goal": goal})

    # --- the repository

    async def _index(self, request: Request) -> Reply:
        only = (await self._small(request, ("ready",))).get("ready", False)
        if not isinstance(only, bool):
            raise DataError("ready must be true or false")
        return as_json([index_entry(e) for e in self.shelf.index() if e.state == "READY" or not only])

    async def _load(self, request: Request) -> Reply:
        await asyncio.to_thread(self.shelf.load, request.name, await self._parameters(request))
        return as_json({})

    async def _unload(self, request: Request) -> Reply:
        await self._parameters(request)  # Triton's `unload_dependents`: there are none here
        await asyncio.to_thread(self.shelf.unload, request.name)
        return as_json({})

    async def _parameters(self, request: Request) -> dict[str, Any]:
        """What goes with an order to load or unload."""
        found = (await self._small(request, ("parameters",))).get("parameters")
        if not isinstance(found, (dict, type(None))):
            raise DataError("parameters must be an object")
        return found or {}

    async def _small(self, request: Request, fields: tuple[str, ...]) -> dict[str, Any]:
        """A body of a few settings; it may be left out."""
        limit, seconds = self.settings.max_json_bytes, self.settings.body_seconds
        body = await read_body(request.headers, request.receive, most=min(limit, LARGE), seconds=seconds)
        found = read_json(bytes(body), self.settings.max_json_parts) if len(body) else {}
        if unknown := [key for key in found if key not in fields]:
            raise DataError(f"the body has a field {unknown[0][:60]!r}, but may have {', '.join(fields)}")
        return found


PAGE_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
     b"connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
)  # fmt: skip


async def _aside(kind: str, receive: Receive, send: Send) -> None:
    """What is not a request: nothing is to be prepared, and no sockets are offered."""
    if kind == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1000})
        return
    while (await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


def _check_kind(headers: Headers) -> None:
    """aiohttp, and so one of Triton's clients, calls JSON `application/octet-stream`; so both names do for both."""
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind not in (b"", b"application/json", BINARY) and not kind.endswith(b"+json"):
        words = f"the body is {kind.decode('latin-1')[:60]!r}, but must be application/json or application/octet-stream"
        raise ReplyError(415, words)


def _header_length(headers: Headers) -> int | None:
    """The bytes of the JSON, where binary tensors follow it."""
    given = headers.get(b"inference-header-content-length")
    if given is None:
        return None
    if not given.isdigit() or len(given) > 18:
        words = f"must be a whole number, but is {given.decode('latin-1')[:60]!r}"
        raise ReplyError(400, f"Inference-Header-Content-Length {words}")
    return int(given)
