"""The process that computes for a server (`isolation`): loads rungs and answers what is asked on its two lines."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from accelerando.bundle import Bundle
from accelerando.errors import AccelerandoError, BundleError, RowsError
from accelerando.memory import give_back
from accelerando.recipe import Runner
from accelerando.serve.batches import run_within
from accelerando.serve.passage import Passage
from accelerando.serve.priority import import_gently
from accelerando.signature import Array


def work() -> None:
    """Say that it is up, and answer until the server hangs up."""
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
            except BaseException as error:  # noqa: BLE001  whatever a backend raises is told to the server
                reply = False, RowsError(f"{type(error).__name__}: {error}")
            line.send(reply)


class _Rungs:
    """Those that are loaded here."""

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
