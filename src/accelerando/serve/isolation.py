"""Rungs in a process of their own: what kills or hangs it costs the request in hand, and the server goes on.

Two lines lead there, and the process (`worker`) answers each in a thread of its own: one for the calls that are served,
and one for loading rungs and trying them, so that nobody who is served waits for a rung to come up.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerando.errors import RowsError, ServingError
from accelerando.ladder import Rung
from accelerando.recipe import Runner
from accelerando.serve.passage import Passage
from accelerando.signature import Array

START_SECONDS = 120.0  # for coming up, and for loading a rung
CALL_SECONDS = 30.0  # for a call of which it is not known what it should take: what takes longer hangs
LEAST_SECONDS = 2.0  # for one of which it is: shared machines stand still for a second at times
SLOWER, MUCH_SLOWER = 50, 4  # times as long as it should take; the second where the first is more than `CALL_SECONDS`
NEWBORN = "from accelerando.serve.worker import work; work()"
GENTLY = "from accelerando.serve.priority import import_gently; import_gently('accelerando.serve.worker'); "


class LostError(RowsError):
    """The process that computed died, or hung and was killed; the next call starts another."""


class StartError(LostError):
    """The process was lost while it came up or loaded a rung, so that nothing is known of the rows."""


class Unfinished(Exception):  # noqa: N818  nothing went wrong
    """A call that its caller would not wait for any longer; `wait` does, and has to be called."""

    def __init__(self, wait: Callable[[], list[Array]]) -> None:
        super().__init__()
        self.wait = wait


class Apart:
    """A process that holds the rungs of one bundle.  Thread-safe; one call at a time on each of its lines.

    Args:
        path: of the bundle, whose files the process opens and checks itself.
        seconds: after which a call is given up and the process killed, where it is not known what it should take.
        gently: others are being served meanwhile, and must not be held up by its coming up.

    Raises:
        LostError: the process does not come up.
    """

    def __init__(self, path: Path, seconds: float = CALL_SECONDS, gently: bool = False) -> None:
        self._path, self._seconds = path, seconds
        # The first may be held when the second is taken, and either when the third is; not the other way round.
        self._calling, self._loading, self._birth = threading.Lock(), threading.RLock(), threading.Lock()
        self._closed = False
        self._life: _Life | None = _Life(path, gently)

    def pid(self) -> int:
        """Of the process, which is up, or of this one while it has died."""
        life = self._life
        return life.process.pid if life and not life.ended else os.getpid()

    def start(self, rung: Rung) -> Remote:
        """Load a rung there.

        Raises:
            AccelerandoError: whatever `Bundle.start` raises there.
            LostError: the process died of it.
        """
        self._loaded(rung.recipe.key)
        return Remote(self, rung.recipe.key)

    def call(
        self,
        key: str,
        leaves: Sequence[Array],
        most_rows: int = 0,
        expected: float | None = None,
        aside: bool = False,
    ) -> list[Array]:
        """Answer one request; a process that was lost is started again first, and its rung loaded.

        Args:
            most_rows: that are computed at a time, 0 for all.
            expected: seconds that so many should take, where that is known.
            aside: on the line for loading: whoever is served meanwhile need not wait.

        Raises:
            BundleError: its files can't be trusted any longer.
            LostError: the process died, or hung and was killed.
        """
        with self._loading if aside else self._calling:
            life = self._loaded(key)
            seconds = self._limit(life, key, len(leaves[0]), most_rows, expected)
            answers: list[Array] = life.ask(aside, ("call", key, list(leaves), most_rows), seconds)
            return answers

    def _limit(self, life: _Life, key: str, rows: int, most_rows: int, expected: float | None) -> float:
        """Seconds after which a call that is about to be sent hangs.

        The first call of a size may have to build a session, so that it is not known what it should take.
        """
        at_once = min(rows, most_rows or rows)
        sizes, known = {at_once, rows % at_once or at_once}, life.started.get(key, set())
        each = self._seconds
        if expected is not None and sizes <= known:
            each = max(min(SLOWER * expected, each), MUCH_SLOWER * expected, LEAST_SECONDS)
        known |= sizes
        return each * -(-rows // at_once)

    def call_within(
        self, key: str, leaves: Sequence[Array], most_rows: int, expected: float | None, patience: float
    ) -> list[Array]:
        """As `call`, for a caller who must not wait for longer than about `patience` seconds.

        Raises:
            Unfinished: it takes longer; until `wait` is called, which is for another thread, nobody else is answered.
        """
        life, later = self._life, Unfinished(partial(self.call, key, leaves, most_rows, expected))
        if life is None or life.ended or key not in life.started or not self._calling.acquire(blocking=False):
            raise later
        held = True
        try:
            seconds = self._limit(life, key, len(leaves[0]), most_rows, expected)
            life.say(False, ("call", key, list(leaves), most_rows), seconds)
            if life.calls.comes_within(patience):
                answers: list[Array] = life.reply(False, seconds)
                return answers
            held = False
            raise Unfinished(partial(self._reply, life, seconds))
        finally:
            if held:
                self._calling.release()

    def _reply(self, life: _Life, seconds: float) -> list[Array]:
        """The answers to a call that has been sent."""
        try:
            answers: list[Array] = life.reply(False, seconds)
            return answers
        finally:
            self._calling.release()

    def stop(self, key: str) -> None:
        """Unload a rung."""
        with self._loading:
            life = self._life
            if life is not None and not life.ended and key in life.started:
                del life.started[key]
                with suppress(ServingError):
                    life.ask(True, ("stop", key), self._seconds)

    def close(self) -> None:
        """End the process."""
        with self._birth:
            self._closed = True
            if self._life is not None:
                self._life.end()

    def _loaded(self, key: str) -> _Life:
        """The process, up and with this rung."""
        try:
            life = self._up()
            if key not in life.started:
                with self._loading:
                    life = self._up()
                    if key not in life.started:
                        life.ask(True, ("start", key), START_SECONDS)
                        life.started[key] = set()
            return life
        except (LostError, OSError) as error:
            raise StartError(f"the rung could not be loaded: {error}") from error

    def _up(self) -> _Life:
        with self._birth:
            if self._closed:
                raise LostError("the process of the rungs was ended")
            if self._life is None or self._life.ended:
                self._life = None
                self._life = _Life(self._path)
            return self._life


class _Life:
    """One process, from its birth to its end.

    Messages are pickles of plain arrays over private lines, both ends of which are this program.
    """

    def __init__(self, path: Path, gently: bool = False) -> None:
        self.started: dict[str, set[int]] = {}  # rungs by their keys: the numbers of rows that each was asked at a time
        self.ended = False
        self._ending = threading.Lock()
        (self.calls, theirs), (self.loads, theirs_too) = Passage.made(), Passage.made()
        descriptors = (*theirs, *theirs_too)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", GENTLY * gently + NEWBORN, str(path), str(gently), *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C at the terminal is the server's to handle
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self.reply(False, START_SECONDS)  # until then it imports, and what it holds is not yet what it holds idle

    def ask(self, aside: bool, message: tuple[Any, ...], seconds: float) -> Any:
        """What the process replies; raises what it replies where that is an error, and LostError where it is lost."""
        self.say(aside, message, seconds)
        return self.reply(aside, seconds)

    def say(self, aside: bool, message: tuple[Any, ...], seconds: float) -> None:
        self._hold(partial((self.loads if aside else self.calls).send, message), seconds)

    def reply(self, aside: bool, seconds: float) -> Any:
        fine, reply = self._hold((self.loads if aside else self.calls).receive, seconds)
        if fine:
            return reply
        raise reply

    def _hold(self, talk: Callable[[float], Any], seconds: float) -> Any:
        """Talk with the process; where that fails in any way it is ended, for nobody knows what it would say next."""
        talked = False
        try:
            value = talk(seconds)
            talked = True
            return value
        except TimeoutError as error:
            raise LostError(f"no answer came within {seconds:g} s; the process was killed") from error
        except (EOFError, OSError) as error:
            raise LostError(f"the process that computed it died{self._last_words()}") from error
        finally:
            if not talked:
                self.end()

    def _last_words(self) -> str:
        try:
            status = self.process.wait(2)
        except subprocess.TimeoutExpired:
            return ""
        return f" of {signal.Signals(-status).name}" if status < 0 else f" with status {status}" if status else ""

    def end(self) -> None:
        """Kill it, and hang up.  Who still waits for it learns of its death by itself."""
        self.ended = True
        with self._ending:
            self.process.kill()
            self.process.wait()
            for line in (self.calls, self.loads):
                line.close()


class Remote(Runner):
    """A rung over there.  Thread-safe.

    Args:
        aside: whether it is asked on the line for loading.
    """

    def __init__(self, apart: Apart, key: str, aside: bool = False) -> None:
        self._apart, self._key, self._aside = apart, key, aside

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        return self._apart.call(self._key, leaves, aside=self._aside)

    def run(
        self, leaves: Sequence[Array], most_rows: int, patience: float, expected: float | None = None
    ) -> list[Array]:
        """As `Apart.call_within`, or `Apart.call` where patience is endless."""
        if patience == math.inf:
            return self._apart.call(self._key, leaves, most_rows, expected)
        return self._apart.call_within(self._key, leaves, most_rows, expected, patience)

    def aside(self) -> Runner:
        """The same rung, asked while others are served."""
        return Remote(self._apart, self._key, aside=True)

    def close(self) -> None:
        self._apart.stop(self._key)
