"""Who may come in and how much they may bring: the server's limits, its bearer tokens, and the names it answers to.

Tokens stand in a file, one a line; blank lines and lines that begin with `#` are left out.  The file is read anew
when it changes, so tokens are rotated by replacing it.  A file that is missing or empty lets nobody in.

A page from elsewhere could have its own name lead to the loopback (DNS rebinding), and would then be at home here for
the browser that shows it.  It can't hide that name, though: the browser sends it as `Host`.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from accelerando.errors import UsageError
from accelerando.server.exchange import App, Receive, Scope, Send, as_error

HEALTH = ("/v2/health/live", "/v2/health/ready")  # what watches a server has no token
PAGES = ("/", "/docs")  # they hold no secret: each asks its reader for the token, and then the server for the rest
SAFE = ("GET", "HEAD", "OPTIONS")
MOST_BODY_BYTES = 2**31 - 1  # what gRPC can count
MOST_TOKEN_BYTES = 2**20  # of the whole file
LOCAL = ("localhost", "127.0.0.1", "::1")
CHALLENGE = (b"www-authenticate", b'Bearer realm="accelerando"')
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the server takes and how it calls itself.

    Args:
        server_name: told at `/v2`; some clients' examples insist on `triton`.
        max_body_bytes: of a request, also once it is decompressed; `max_json_bytes` of its JSON part, which becomes
            some ten times as large in memory, and while it is parsed nobody else is served; `max_json_parts` lists and
            objects in it.
        max_tensors: inputs, and likewise outputs, that one request may name.
        max_rows: that one request may hold; told to clients as `max_batch_size`.
        max_nesting: axes of a tensor, and so the depth of its nested data.
        body_seconds: within which the whole body must have come.
        compress_from: bytes from which on an answer is compressed for a client that takes it so.
        tokens: the file of the tokens; None lets everybody in.
        hosts: the names, in lower case, by which a request may call the server; None for any (`names_of`).

    Raises:
        UsageError: a limit that lets nothing through, or more than can be counted.
    """

    server_name: str = "accelerando"
    max_body_bytes: int = 64 * 2**20
    max_json_bytes: int = 8 * 2**20
    max_json_parts: int = 100_000
    max_tensors: int = 64
    max_rows: int = 4096
    max_nesting: int = 32
    body_seconds: float = 30.0
    compress_from: int = 16 * 2**10
    tokens: Path | None = None
    hosts: frozenset[str] | None = None

    def __post_init__(self) -> None:
        sizes = ("max_body_bytes", "max_json_bytes", "max_json_parts", "max_tensors", "max_rows", "max_nesting")
        for name in (*sizes, "body_seconds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be above 0, but is {getattr(self, name)}")
        if self.max_body_bytes > MOST_BODY_BYTES:
            raise UsageError(
                f"a body may have at most {MOST_BODY_BYTES:,} bytes, but {self.max_body_bytes:,} were asked"
            )


def names_of(host: str, allowed: Sequence[str] = (), *, guarded: bool = False) -> frozenset[str] | None:
    """The names that a server answers to; None for any.

    Args:
        host: where it listens.  On the loopback it has the loopback's names, and no other may lead there.
        allowed: further names, by which a proxy may pass on its callers for instance; with them, the names are held
            to wherever it listens.
        guarded: by tokens, which a page from elsewhere does not have.

    Raises:
        UsageError: a name is none.
    """
    further = [_name(name.encode()) for name in allowed]
    for name, given in zip(further, allowed, strict=True):
        if given.lower() not in (name, f"[{name}]") or not name:
            raise UsageError(f"{given!r} is not a host's name; give it without scheme and port, as in example.com")
    if further or (_is_loopback(host) and not guarded):
        return frozenset([*LOCAL, host.lower(), *further])
    return None


class Tokens:
    """The tokens of a file.  Not thread-safe: it belongs to one event loop."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: tuple[int, ...] | None = None
        self._digests: tuple[bytes, ...] = ()
        self._look()

    def __bool__(self) -> bool:
        """Whether there is any token that lets somebody in."""
        self._look()
        return bool(self._digests)

    def admit(self, token: bytes) -> bool:
        """Whether this is one of them; takes as long for a wrong one as for a right one."""
        self._look()
        given = hashlib.sha256(token).digest()  # so that lengths don't tell either
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0  # all are compared

    def _look(self) -> None:
        """Read the file if it is not the one that was read last."""
        try:
            facts = self.path.stat()
            mark: tuple[int, ...] = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
        except OSError as error:
            mark, facts, trouble = (), None, error.strerror or str(error)
        if mark == self._seen:
            return
        self._seen, self._digests = mark, ()
        if facts is None:
            log.error("nobody is let in: the tokens file %s can't be read: %s", self.path, trouble)
            return
        try:
            if facts.st_size > MOST_TOKEN_BYTES:
                raise OSError(f"it is larger than {MOST_TOKEN_BYTES} bytes")
            lines = [line.strip() for line in self.path.read_bytes().splitlines()]
        except OSError as error:
            log.error("nobody is let in: the tokens file %s can't be read: %s", self.path, error)
            self._seen = None  # try again
            return
        self._digests = tuple(hashlib.sha256(line).digest() for line in lines if line and not line.startswith(b"#"))
        if os.name == "posix" and facts.st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning("the tokens file %s can be read by other users; `chmod 600` it", self.path)
        if self._digests:
            log.info("%d tokens were read from %s", len(self._digests), self.path)
        else:
            log.error("nobody is let in: the tokens file %s holds no token", self.path)


class Access:
    """ASGI middleware: lets through who has a token, and no page of another site.

    Args:
        app: everything that the server offers.
        settings: `tokens` is the file; without one, everybody may come in.  `hosts` are the server's own names.

    A token comes in the header `Authorization: Bearer TOKEN`.  Health and the pages themselves need none.
    """

    def __init__(self, app: App, settings: Settings) -> None:
        self.app = app
        self.tokens = None if settings.tokens is None else Tokens(settings.tokens)
        self.hosts = settings.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if foreign := self._misled(headers) or self._foreign(scope, headers):
            return await _turn_away(scope, receive, send, 403, foreign)
        if self.tokens is None or (scope.get("method") in SAFE and is_open(scope["path"])):
            return await self.app(scope, receive, send)
        if not self.tokens:
            return await _turn_away(scope, receive, send, 403, "the server has no valid tokens, so nobody is let in")
        token = _token(headers.get(b"authorization", b""))
        if token is None:
            words = "a token is needed: send the header `Authorization: Bearer TOKEN`"
        elif self.tokens.admit(token):
            return await self.app(scope, receive, send)
        else:
            words = "the token is not valid (any longer)"
        return await _turn_away(scope, receive, send, 401, words)

    def _misled(self, headers: dict[bytes, bytes]) -> str:
        """Why a request did not mean this server: it called it by another's name.  Who gives none is no browser."""
        host = headers.get(b"host")
        if self.hosts is None or host is None or _name(host) in self.hosts:
            return ""
        names = ", ".join(sorted(self.hosts))
        return f"this server is not {host.decode('latin-1')[:100]!r}, but {names}; --allow-host gives it further names"

    @staticmethod
    def _foreign(scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Why a browser must not do this for the page that it shows: the page came from elsewhere.

        Without this, any page that a user opens could unload the models of a server on the loopback.
        """
        origin = headers.get(b"origin")
        if origin is None or (scope["type"] == "http" and scope["method"] in SAFE):
            return ""
        try:
            home = urlsplit(origin.decode("ascii")).netloc
        except ValueError:  # UnicodeDecodeError among them
            home = ""
        if home and home.lower().encode() == headers.get(b"host", b"").lower():
            return ""
        return f"a page of {origin.decode('latin-1')[:100]!r} may not change anything here"


@lru_cache(maxsize=64)  # the same few come with every request
def _name(host: bytes) -> str:
    """The name in a `Host` header, in lower case, without its port; empty where it is none."""
    try:
        return (urlsplit(b"//" + host).hostname or b"").decode("ascii")
    except ValueError:  # UnicodeDecodeError among them
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_open(path: str) -> bool:
    """Whether a path may be read without a token."""
    return path in HEALTH or path in PAGES or path.startswith("/dashboard/")


def _token(given: bytes) -> bytes | None:
    """The token of an `Authorization` header."""
    scheme, _, rest = given.partition(b" ")
    return rest.strip() or None if scheme.lower() == b"bearer" else None


async def _turn_away(scope: Scope, receive: Receive, send: Send, status: int, words: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": words[:120]})
        return
    await as_error(status, words, [CHALLENGE] if status == 401 else []).deliver(send, head=scope["method"] == "HEAD")
