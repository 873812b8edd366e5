"""The server as a whole: both protocols, pages and metrics over one shelf, from the first request to the last.

asyncio.run(serve_all(shelf, Service()))
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn

from accelerando.errors import UsageError
from accelerando.server.access import Access, Settings
from accelerando.server.connections import protocol, that_fit
from accelerando.server.dashboard import Dashboard
from accelerando.server.exchange import App, Receive, Reply, Scope, Send, as_error
from accelerando.server.logs import Journal
from accelerando.server.metrics import exposition
from accelerando.server.rest import Rest
from accelerando.server.rpc import RpcServer, Tls, serve_rpc
from accelerando.server.shelf import Shelf
from accelerando.server.tracing import OFF, Tracing
from accelerando.server.traffic import Traffic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """Where and how to serve.

    Args:
        host: on which to listen; the loopback, unless told otherwise.
        port: of HTTP, 0 for any that is free; `grpc_port` likewise, None for no gRPC.
        settings: limits and tokens.
        tls: encryption, of both.
        most_connections: of HTTP at a time, and likewise of gRPC; fewer where so many files can't be open.
        most_calls: of gRPC at a time.
        head_seconds: within which the head of a request must have come, and a handshake of TLS be done.
        idle_seconds: after an answer, within which the next request must begin, or the connection is closed.
        stall_seconds: after which a client that reads nothing of its answer is dropped.
        grace_seconds: for what was accepted, when the server is told to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    settings: Settings = field(default_factory=Settings)
    tls: Tls | None = None
    tracing: Tracing = OFF
    most_connections: int = 1000
    most_calls: int = 1000
    head_seconds: float = 10.0
    idle_seconds: float = 60.0
    stall_seconds: float = 30.0
    grace_seconds: float = 30.0


class Front:
    """What stands before the protocol: the dashboard, and Prometheus' metrics."""

    def __init__(
        self, rest: App, shelf: Shelf, dashboard: Dashboard, journal: Journal | None, traffic: Traffic
    ) -> None:
        self._rest, self._shelf, self._dashboard, self._journal = rest, shelf, dashboard, journal
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == "/metrics":
            await self._metrics(scope).deliver(send, head=scope["method"] == "HEAD")
        elif self._dashboard.takes(path):
            await self._dashboard(scope, receive, send)
        else:
            await self._rest(scope, receive, send)

    def _metrics(self, scope: Scope) -> Reply:
        method = scope["method"]
        if method not in ("GET", "HEAD"):
            return as_error(405, f"/metrics takes GET, but got {method[:20]}", [(b"allow", b"GET, HEAD")])
        accept = dict(scope["headers"]).get(b"accept", b"").decode("latin-1")
        lost = self._journal.lost if self._journal else None
        kind, text = exposition(self._shelf, accept, lost_log_lines=lost, traffic=self._traffic)
        return Reply(200, text, kind.encode())


async def serve_all(
    shelf: Shelf,
    service: Service,
    started: Callable[[int, int | None], None] = lambda port, grpc_port: None,
    journal: Journal | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT comes; what was accepted by then is answered.

    Args:
        started: told the ports once requests are taken.

    Raises:
        UsageError: a port is taken, or a file of the encryption can't be used.
    """
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # not here, or not the main thread
            loop.add_signal_handler(number, ending.set)
    most, most_rpc = that_fit(
        service.most_connections, service.most_connections if service.grpc_port is not None else 0
    )
    service = replace(service, most_connections=most)
    dashboard = Dashboard(shelf)
    traffic = Traffic()
    app = Front(Rest(shelf, service.settings, tracing=service.tracing, pages=True), shelf, dashboard, journal, traffic)
    http = _Http(_config(traffic.of(Access(app, service.settings)), service), service.head_seconds)
    rpc: RpcServer | None = None
    if service.grpc_port is not None:
        rpc = serve_rpc(
            shelf, service.settings, host=service.host, port=service.grpc_port, tls=service.tls,
            tracing=service.tracing, most_calls=service.most_calls, most_connections=most_rpc, traffic=traffic,
        )  # fmt: skip
    listening = _listen(service.host, service.port)
    if rpc:
        await rpc.start()
    serving = asyncio.create_task(http.serve(sockets=[listening]))
    watching = asyncio.create_task(dashboard.watch())
    try:
        while not http.started and not serving.done():
            await asyncio.sleep(0.01)
        if not serving.done():
            started(listening.getsockname()[1], rpc.port if rpc else None)
            ended = asyncio.create_task(ending.wait())
            await asyncio.wait([ended, serving], return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
    finally:
        log.info("ending")
        shelf.drain()
        dashboard.close()
        http.should_exit = True
        await asyncio.gather(serving, watching, *([rpc.stop(service.grace_seconds)] if rpc else []))
        service.tracing.close()


class _Http(uvicorn.Server):
    """uvicorn, which would take the signals for itself and pass them on when it is done: here they end more than it.

    Args:
        handshake_seconds: within which the handshake of TLS must be done; uvicorn leaves it a minute.
    """

    def __init__(self, config: uvicorn.Config, handshake_seconds: float) -> None:
        super().__init__(config)
        self._handshake: dict[str, Any] = {"ssl_handshake_timeout": handshake_seconds} if config.ssl else {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        config, loop = self.config, asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            return kind(config=config, server_state=self.server_state, app_state={})

        self.servers = [
            await loop.create_server(connection, sock=one, ssl=config.ssl, backlog=config.backlog, **self._handshake)
            for one in sockets or []
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


def _config(app: Any, service: Service) -> uvicorn.Config:
    """What uvicorn is told; raises UsageError where a file of the encryption can't be used."""
    tls = service.tls
    config = uvicorn.Config(
        app,
        http=protocol(
            service.most_connections,
            head_seconds=service.head_seconds,
            idle_seconds=service.idle_seconds,
            stall_seconds=service.stall_seconds,
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(service.grace_seconds),
        ssl_certfile=str(tls.certificate) if tls else None,
        ssl_keyfile=str(tls.key) if tls else None,
        ssl_ca_certs=str(tls.clients) if tls and tls.clients else None,
        ssl_cert_reqs=2 if tls and tls.clients else 0,
    )
    try:
        config.load()
    except OSError as error:  # those of TLS among them
        raise UsageError(
            f"the files given for TLS can't be used: {error.strerror or error}; give a certificate and its key, as PEM"
        ) from error
    return config


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; the port is taken before anything else is done."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # by its protocol asyncio knows that small answers must not wait for their receiver's acknowledgement
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UsageError(
            f"{host}:{port} can't be listened on: {error.strerror or error}; give another --port or --host"
        ) from error
    return listening
