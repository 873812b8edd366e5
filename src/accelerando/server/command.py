"""`accelerando serve`: from what was typed to a server that runs."""

from __future__ import annotations

import asyncio
import gc
import sys
import warnings
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import UsageError
from accelerando.goal import Goal
from accelerando.goal_text import BYTES, amount
from accelerando.serve.governed import GovernedModel, govern
from accelerando.serve.runtime import MachineWarning
from accelerando.server import logs
from accelerando.server.access import Settings, names_of
from accelerando.server.rpc import Tls
from accelerando.server.run import Service, serve_all
from accelerando.server.shelf import Shelf
from accelerando.server.tracing import OFF, to_collector

# How long a thread may keep the interpreter while another waits for it.  Python's 5 ms are longer than a small model
# takes, and its executor would wait for the event loop each time that it comes back from computing.
SWITCH_SECONDS = 2e-4
NO_PORT = -1
TAKEN = ("stats",)  # by the protocol: /v2/models/stats is of all models


@dataclass(frozen=True)
class Wishes:
    """The options of `accelerando serve`, as they were typed."""

    goal: str | None
    host: str
    port: int
    grpc_port: int
    memory: str | None
    governor: str
    audit: float
    isolate: bool
    watch: bool
    tokens: Path | None
    certificate: Path | None
    key: Path | None
    max_body: str
    log: Path | None
    traces: str | None
    allowed_hosts: Sequence[str] = ()


def serve_bundles(bundles: Sequence[str], wishes: Wishes, say: Callable[[str], None]) -> None:
    """Serve until it is told to end.

    Args:
        bundles: FOLDER or NAME=FOLDER each.
        say: told where it serves.

    Raises:
        UsageError, GoalError, BundleError: something that was given can't be; nothing has been served yet.
    """
    folders = named(bundles)
    service = _service(wishes)
    if wishes.goal is not None:
        Goal.parse(wishes.goal)
    for folder in folders.values():
        Bundle.open(folder, hashes=False)
    journal = logs.begin(wishes.log)
    sys.setswitchinterval(SWITCH_SECONDS)

    def made(name: str, folder: Path) -> GovernedModel:
        with warnings.catch_warnings():
            warnings.simplefilter("always", MachineWarning)
            return govern(
                folder, goal=wishes.goal, memory=wishes.memory, governor=wishes.governor, audit=wishes.audit,
                isolated=wishes.isolate, name=name,
            )  # fmt: skip

    def started(port: int, grpc_port: int | None) -> None:
        scheme = "https" if service.tls else "http"
        host = f"[{service.host}]" if ":" in service.host else service.host
        say(f"serving {', '.join(folders)} at {scheme}://{host}:{port}")
        if grpc_port is not None:
            say(f"gRPC at {host}:{grpc_port}")
        gc.collect()
        gc.freeze()  # what is loaded stays: each full collection would look through all of it, for 40 to 80 ms

    try:
        shelf = Shelf(folders, made, watched=wishes.watch)
        try:
            _run(serve_all(shelf, service, started, journal))
        finally:
            shelf.close()
    finally:
        journal.close()


def _run(serving: Coroutine[Any, Any, None]) -> None:
    """In uvloop's event loop where it is to be had: the quicker one."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(serving)
    else:
        uvloop.run(serving)


def named(bundles: Sequence[str]) -> dict[str, Path]:
    """Folders by name; without a name, a folder's own.

    Raises:
        UsageError: a name is not one that a path of HTTP can hold, or is there twice.
    """
    found: dict[str, Path] = {}
    for text in bundles:
        name, sign, folder = text.partition("=")
        path = Path(folder if sign else text)
        name = name if sign else path.resolve().name
        if not name[:1].isalnum() or not all(c.isalnum() or c in "-_." for c in name) or name in TAKEN:
            raise UsageError(
                f"{name!r} can't be a model's name; give letters, digits, '-', '_' or '.', a letter or digit first, "
                f"but not {' or '.join(TAKEN)}, as in NAME={path}"
            )
        if name in found:
            raise UsageError(f"two bundles are called {name!r}; give one another name, as in OTHER={path}")
        found[name] = path
    return found


def _service(wishes: Wishes) -> Service:
    if (wishes.certificate is None) != (wishes.key is None):
        raise UsageError("TLS takes both --certificate and --key, but only one was given")
    for path in (wishes.certificate, wishes.key, wishes.tokens):
        if path is not None and not path.is_file():
            raise UsageError(f"there is no file {path}")
    if wishes.key is not None and b"ENCRYPTED" in wishes.key.read_bytes():
        raise UsageError(
            f"the key {wishes.key} is encrypted, and nobody is there to type its phrase; give it decrypted"
        )
    if not wishes.host.strip():
        raise UsageError("--host is empty, which would be every network; give an address, such as 127.0.0.1")
    _check_port("--port", wishes.port)
    if wishes.grpc_port != NO_PORT:
        _check_port("--grpc-port", wishes.grpc_port, f", or {NO_PORT} for none")
    tls = Tls(wishes.certificate, wishes.key) if wishes.certificate and wishes.key else None
    settings = Settings(
        max_body_bytes=int(amount(wishes.max_body, BYTES, "--max-body")),
        tokens=wishes.tokens,
        hosts=names_of(wishes.host, wishes.allowed_hosts, guarded=wishes.tokens is not None),
    )
    tracing = to_collector(wishes.traces) if wishes.traces else OFF
    return Service(
        wishes.host, wishes.port, wishes.grpc_port if wishes.grpc_port != NO_PORT else None, settings, tls, tracing
    )


def _check_port(option: str, port: int, more: str = "") -> None:
    if not 0 <= port < 2**16:
        raise UsageError(f"{option} must be from 0 (any that is free) to 65535{more}, but is {port}")
