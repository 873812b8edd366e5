"""Rungs in a process of their own: what kills or hangs it costs the request in hand, and the server goes on.

Two lines lead there, and the process answers each in a thread of its own: one for the calls that are served, and one
for loading rungs and trying them, so that nobody who is served waits for a rung to come up.
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

from accelerando.bundle import Bundle
from accelerando.errors import AccelerandoError, BundleError, RowsError, ServingError
from accelerando.ladder import Rung
from accelerando.recipe import Runner
from accelerando.serve.batches import run_within
from accelerando.serve.footprint import give_back
from accelerando.serve.passage import Passage
from accelerando.serve.priority import import_gently
from accelerando.signature import Array

START_SECONDS = 120.0  # for coming up, and for loading a rung
CALL_SECONDS = 30.0  # for one call: what takes longer hangs
NEWBORN = "from accelerando.serve.isolation import work; work()"
GENTLY = "from accelerando.serve.priority import import_gently; import_gently('accelerando.serve.isolation'); "


class LostError(RowsError):
    """The process that computed died, or hung and was killed; the next call starts another."""


class Unfinished(Exception):  # noqa: N818  nothing went wrong
    """A call that its caller would not wait for any longer; `wait` does, and has to be called."""

    def __init__(self, wait: Callable[[], list[Array]]) -> None:
        super().__init__()
        self.wait = wait


class Apart:
    """A process that holds the rungs of one bundle.  Thread-safe; one call at a time on each of its lines.

    Args:
        path: of the bundle, whose files the process opens and checks itself.
        seconds: after which a call is given up, and the process killed.
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

    def call(self, key: str, leaves: Sequence[Array], most_rows: int = 0, aside: bool = False) -> list[Array]:
        """Answer one request; a process that was lost is started again first, and its rung loaded.

        Args:
            most_rows: that are computed at a time, 0 for all.
            aside: on the line for loading: whoever is served meanwhile need not wait.
        """
        with self._loading if aside else self._calling:
            life = self._loaded(key)
            answers: list[Array] = life.ask(
                aside, ("call", key, list(leaves), most_rows), self._most(leaves, most_rows)
            )
            return answers

    def _most(self, leaves: Sequence[Array], most_rows: int) -> float:
        """Seconds after which a call is given up."""
        return self._seconds * (-(-len(leaves[0]) // most_rows) if most_rows and leaves else 1)

    def call_within(self, key: str, leaves: Sequence[Array], most_rows: int, patience: float) -> list[Array]:
        """As `call`, for a caller who must not wait for longer than about `patience` seconds.

        Raises:
            Unfinished: it takes longer; until `wait` is called, which is for another thread, nobody else is answered.
        """
        life = self._life
        later, seconds = Unfinished(partial(self.call, key, leaves, most_rows)), self._most(leaves, most_rows)
        if life is None or life.ended or key not in life.started or not self._calling.acquire(blocking=False):
            raise later
        held = True
        try:
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
                life.started.discard(key)
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
        life = self._up()
        if key not in life.started:
            with self._loading:
                life = self._up()
                if key not in life.started:
                    life.ask(True, ("start", key), START_SECONDS)
                    life.started.add(key)
        return life

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
        self.started: set[str] = set()
        self.ended = False
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
        """Kill it.  Who still waits for it learns of its death by itself."""
        self.ended = True
        self.process.kill()
        self.process.wait()


class Remote(Runner):
    """A rung over there.  Thread-safe.

    Args:
        aside: whether it is asked on the line for loading.
    """

    def __init__(self, apart: Apart, key: str, aside: bool = False) -> None:
        self._apart, self._key, self._aside = apart, key, aside

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        return self._apart.call(self._key, leaves, aside=self._aside)

    def run(self, leaves: Sequence[Array], most_rows: int, patience: float) -> list[Array]:
        """As `Apart.call_within`, or `Apart.call` where patience is endless."""
        if patience == math.inf:
            return self._apart.call(self._key, leaves, most_rows)
        return self._apart.call_within(self._key, leaves, most_rows, patience)

    def aside(self) -> Runner:
        """The same rung, asked while others are served."""
        return Remote(self._apart, self._key, aside=True)

    def close(self) -> None:
        self._apart.stop(self._key)


def work() -> None:
    """What the process does: says that it is up, and answers until its server hangs up."""
    path, gently, *numbers = sys.argv[1:]
    descriptors = [int(number) for number in numbers]
    calls, loads = Passage.inherited(*descriptors[:3]), Passage.inherited(*descriptors[3:])
    rungs = _Rungs(Path(path), gently == "True")
    threading.Thread(target=_answer, args=(loads, rungs), daemon=True).start()
    with suppress(OSError):
        calls.send((True, None))
        _answer(calls, rungs)
    os._exit(0)  # whatever still computes has nobody to tell


def _answer(line: Passage, rungs: _Rungs) -> None:
    """Answer what is asked on one of the lines, until nobody asks any longer."""
    with suppress(EOFError, OSError):
        while True:
            kind, *what = line.receive()
            try:
                reply = True, getattr(rungs, kind)(*what)
            except AccelerandoError as error:
                reply = False, error
            except Exception as error:  # noqa: BLE001  whatever a backend raises is told to the server
                reply = False, RowsError(f"{type(error).__name__}: {error}")
            line.send(reply)


class _Rungs:
    """Those that are loaded over there."""

    def __init__(self, path: Path, gently: bool) -> None:
        self._path, self._gently = path, gently
        self._runners: dict[str, Runner] = {}

    def start(self, key: str) -> None:
        """Load one by its recipe's key: its bundle may have been replaced since the server opened it."""
        bundle = Bundle.open(self._path, hashes=False)  # the rung is hashed when it is started
        rung = next((rung for rung in bundle.ladder if rung.recipe.key == key), None)
        if rung is None:
            words = f"{self._path} holds another bundle by now, without the rung {key}; reload it"
            raise BundleError("missing-file", words)
        if self._gently and rung.recipe.backend.portable:  # the others can't be loaded here at all
            import_gently(*rung.recipe.backend.needs)
        self._runners[key] = bundle.start(rung, spinning=False, shared=True)

    def call(self, key: str, leaves: Sequence[Array], most_rows: int) -> list[Array]:
        return run_within(self._runners[key], leaves, most_rows or len(leaves[0]))

    def stop(self, key: str) -> None:
        self._runners.pop(key).close()
        give_back()
