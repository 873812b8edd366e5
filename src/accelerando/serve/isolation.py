"""Rungs in a process of their own: what kills or hangs it costs the request in hand, and the server goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import AccelerandoError, BundleError, RowsError, ServingError
from accelerando.ladder import Rung
from accelerando.recipe import Runner
from accelerando.serve.footprint import give_back
from accelerando.signature import Array

START_SECONDS = 120.0  # for coming up, and for loading a rung
CALL_SECONDS = 30.0  # for one call: what takes longer hangs


class LostError(RowsError):
    """The process that computed died, or hung and was killed; the next call starts another."""


class Apart:
    """A process that holds the rungs of one bundle.  Thread-safe; one call at a time.

    Messages are pickles of plain arrays over a private pair of sockets, both ends of which are this program.

    Args:
        path: of the bundle, whose files the process opens and checks itself.
        seconds: after which a call is given up, and the process killed.

    Raises:
        LostError: the process does not come up.
    """

    def __init__(self, path: Path, seconds: float = CALL_SECONDS) -> None:
        self._path, self._seconds = path, seconds
        self._talk = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None
        self._started: set[str] = set()
        self._closed = False
        with self._talk:
            self._spawn()

    def pid(self) -> int:
        """Of the process, which is up, or of this one while it has died."""
        process = self._process
        return process.pid if process else os.getpid()

    def start(self, rung: Rung) -> Runner:
        """Load a rung there.

        Raises:
            AccelerandoError: whatever `Bundle.start` raises there.
            LostError: the process died of it.
        """
        with self._talk:
            self._begin(rung.recipe.key)
        return _Remote(self, rung.recipe.key)

    def call(self, key: str, leaves: Sequence[Array]) -> list[Array]:
        """Answer one batch; a process that was lost is started again first, and its rung loaded."""
        with self._talk:
            if key not in self._started:
                self._begin(key)
            answers: list[Array] = self._ask(("call", key, list(leaves)), self._seconds)
            return answers

    def stop(self, key: str) -> None:
        """Unload a rung."""
        with self._talk:
            if key in self._started and not self._closed:
                self._started.discard(key)
                with suppress(ServingError):
                    self._ask(("stop", key), self._seconds)

    def close(self) -> None:
        """End the process."""
        with self._talk:
            self._closed = True
            self._kill()

    def _begin(self, key: str) -> None:
        if self._closed:
            raise LostError("the process of the rungs was ended")
        if self._process is None:
            self._spawn()
        self._ask(("start", key), START_SECONDS)
        self._started.add(key)

    def _ask(self, message: tuple[Any, ...] | None, seconds: float) -> Any:
        """What the process replies; without a message, what it says by itself."""
        if self._line is None:
            raise LostError("the process of the rungs was ended")
        try:
            if message is not None:
                self._line.send(message)
            if not self._line.poll(seconds):
                raise LostError(f"no answer came within {seconds:g} s; the process was killed")
            fine, reply = self._line.recv()
        except (EOFError, OSError) as error:
            raise LostError(f"the process that computed it died{self._last_words()}") from error
        finally:
            if sys.exc_info()[0] is not None:
                self._kill()
        if fine:
            return reply
        raise reply

    def _last_words(self) -> str:
        status = None
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                status = self._process.wait(2)
        if status is None or status >= 0:
            return f" with status {status}" if status else ""
        return f" of {signal.Signals(-status).name}"

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair()
        code = "from accelerando.serve.isolation import work; work()"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), str(self._path)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the terminal is the server's to handle
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self._line = Connection(ours.detach())
        self._started = set()
        self._ask(None, START_SECONDS)  # until then it imports, and what it holds is not yet what it holds idle

    def _kill(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._line = None
        self._started = set()


class _Remote(Runner):
    """A rung over there.  Thread-safe."""

    def __init__(self, apart: Apart, key: str) -> None:
        self._apart, self._key = apart, key

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        return self._apart.call(self._key, leaves)

    def close(self) -> None:
        self._apart.stop(self._key)


def work() -> None:
    """What the process does: says that it is up, and answers until its server hangs up."""
    line, path = Connection(int(sys.argv[1])), Path(sys.argv[2])
    runners: dict[str, Runner] = {}
    with suppress(EOFError, OSError):
        line.send((True, None))
        while True:
            kind, key, *rest = line.recv()
            try:
                reply: Any = None
                if kind == "start":
                    runners[key] = runners.get(key) or _started(path, key)
                elif kind == "stop":
                    runners.pop(key).close()
                    give_back()
                else:
                    reply = runners[key](rest[0])
                line.send((True, reply))
            except AccelerandoError as error:
                line.send((False, error))
            except Exception as error:  # noqa: BLE001  whatever a backend raises is told to the server
                line.send((False, RowsError(f"{type(error).__name__}: {error}")))


def _started(path: Path, key: str) -> Runner:
    """A rung by its recipe's key: its bundle may have been replaced since the server opened it."""
    bundle = Bundle.open(path, hashes=False)  # the rung is hashed when it is started
    for rung in bundle.ladder:
        if rung.recipe.key == key:
            return bundle.start(rung, spinning=False)
    raise BundleError("missing-file", f"{path} holds another bundle by now, without the rung {key}; reload it")
