"""The bundles that a server has, by name: loaded, governed, swapped and let go."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerando.errors import ClosedError, UnknownModelError, UsageError
from accelerando.serve.governed import GovernedModel
from accelerando.server.repository import Entry

log = logging.getLogger(__name__)
LOOK_SECONDS = 2.0  # between two looks at a bundle's manifest
TRIES = 10  # of a bundle that can't be loaded and does not change, each after twice the pause of the one before
Stamp = tuple[int, int, int]
GONE: Stamp = (0, 0, 0)
NO_RUNG = "none of its rungs can run any longer; load its bundle anew"


@dataclass(frozen=True)
class Failure:
    """A bundle that could not be loaded: what its files were like, how often it was tried so, and when it is again."""

    files: Mapping[str, Stamp]
    times: int
    again: float  # by the monotonic clock; infinite once it was tried often enough


class Shelf:
    """A `Repository` of bundles.

    Args:
        bundles: folders by name.
        govern: makes the model of a name and its folder.
        watched: load a bundle anew when its manifest changes; where that fails, try again a few times with growing
            pauses, and afresh whenever any of its files changes, for they may still be on their way.

    Raises:
        AccelerandoError: a bundle can't be loaded; the others were let go.
    """

    def __init__(
        self, bundles: Mapping[str, Path], govern: Callable[[str, Path], GovernedModel], watched: bool = False
    ) -> None:
        self._bundles, self._govern = dict(bundles), govern
        self._models: dict[str, GovernedModel] = {}
        self._goals: dict[str, str] = {}  # set since the start: a model that is loaded anew keeps its goal
        self._why: dict[str, str] = {}
        self._loading: set[str] = set()
        self._lock = threading.Lock()  # for the dictionaries
        self._changing = {name: threading.Lock() for name in bundles}  # one change of a model at a time
        self._closing = threading.Event()
        self._watched = watched
        self._seen: dict[str, Stamp] = {}  # the manifests that were loaded last
        self._failures: dict[str, Failure] = {}
        try:
            for name in bundles:
                self.load(name)
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name="accelerando-reload", daemon=True)
        if watched:
            self._watcher.start()

    # --- what there is ------------------------------------------------------------------------------------------

    def find(self, name: str, version: str | None = None) -> GovernedModel:
        """A model that is loaded; see `Repository`."""
        model = self._models.get(name)
        if model is None:
            self._know(name)
            raise ClosedError(f"{name!r} is not loaded; load it first")
        if version and version != str(model.version):
            raise UnknownModelError(f"there is no version {version!r} of {name!r}; it is at {model.version}")
        return model

    def versions(self, name: str) -> tuple[str, ...]:
        """The one version that answers."""
        self._know(name)
        model = self._models.get(name)
        return (str(model.version),) if model else ()

    def index(self) -> tuple[Entry, ...]:
        """Every model, whether loaded or not."""
        with self._lock:
            return tuple(self._entry(name) for name in sorted(self._bundles))

    def _entry(self, name: str) -> Entry:
        model = self._models.get(name)
        if model is not None and model.ready:
            return Entry(name, str(model.version), "READY", self._why.get(name, ""))
        if name in self._loading:
            return Entry(name, "", "LOADING")
        return Entry(name, "", "UNAVAILABLE", self._why.get(name, "unloaded" if model is None else NO_RUNG))

    @property
    def ready(self) -> bool:
        """Whether all that is loaded answers, and it is not closing."""
        with self._lock:
            return not self._closing.is_set() and not self._loading - self._models.keys() and all(
                model.ready for model in self._models.values()
            )  # fmt: skip

    def _know(self, name: str) -> None:
        if name not in self._bundles:
            there = ", ".join(map(repr, sorted(self._bundles))) or "none"
            raise UnknownModelError(f"there is no model {name!r}; there are {there}")

    # --- change -------------------------------------------------------------------------------------------------

    def load(self, name: str, parameters: Mapping[str, object] | None = None) -> None:
        """Load a model, or go over to what its folder holds by now; see `Repository`."""
        self._know(name)
        if parameters:
            raise UsageError(
                f"{', '.join(map(repr, parameters))} was given, but a bundle is loaded as it is; leave it out"
            )
        with self._changing[name]:
            files = self._files(name)
            with self._lock:
                self._loading.add(name)
                old = self._models.get(name)
            try:
                self._seen[name] = files.get("manifest.json", GONE)
                if old is not None:
                    old.update(self._bundles[name])
                else:
                    model = self._govern(name, self._bundles[name])
                    if name in self._goals:
                        model.goal = self._goals[name]
                    with self._lock:
                        self._models[name] = model
                self._why.pop(name, None)
                self._failures.pop(name, None)
                log.info("loaded", extra={"model": name, "bundle": str(self._bundles[name])})
            except Exception as error:
                self._why[name] = f"it could not be loaded{' anew' if old else ''}: {error}{self._fail(name, files)}"
                raise
            finally:
                with self._lock:
                    self._loading.discard(name)

    def unload(self, name: str) -> None:
        """Let a model go once what it has accepted is answered; see `Repository`."""
        self._know(name)
        with self._changing[name]:
            with self._lock:
                model = self._models.pop(name, None)
            if model is not None:
                model.close()
                log.info("unloaded", extra={"model": name})

    def set_goal(self, name: str, goal: str) -> None:
        """Change a model's goal, from its next batch on; see `Repository`."""
        self.find(name).goal = goal
        self._goals[name] = goal
        log.info("goal", extra={"model": name, "goal": goal})

    def drain(self) -> None:
        """Be ready no more; what comes is still answered."""
        self._closing.set()

    def close(self) -> None:
        """Answer what was accepted, then let every model go."""
        self._closing.set()
        for name in list(self._models):
            self.unload(name)

    # --- hot reload ---------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_SECONDS):
            for name in filter(self._is_due, list(self._models)):
                try:
                    self.load(name)
                except Exception as error:  # noqa: BLE001  whatever it is: the other bundles are watched on
                    log.warning("reload", extra={"model": name, "reason": str(error)})

    def _is_due(self, name: str) -> bool:
        """Whether a bundle is to be loaded anew; one that vanished goes on from memory."""
        failure = self._failures.get(name)
        if failure is None:
            return _stamp(self._bundles[name] / "manifest.json") not in (GONE, self._seen[name])
        files = self._files(name)
        return "manifest.json" in files and (time.monotonic() >= failure.again or files != failure.files)

    def _fail(self, name: str, files: Mapping[str, Stamp]) -> str:
        """Note that a bundle could not be loaded; what becomes of it, in words."""
        last = self._failures.get(name)
        times = last.times + 1 if last and last.files == files else 1
        pause = LOOK_SECONDS * 2 ** (times - 1) if times < TRIES else math.inf
        self._failures[name] = Failure(files, times, time.monotonic() + pause)
        if not self._watched or name not in self._models:
            return ""
        soon = f"in {pause:g} s, or " if times < TRIES else ""
        return f" (it is tried again {soon}when its files change)"

    def _files(self, name: str) -> dict[str, Stamp]:
        """What there is of a bundle, by its path in the folder."""
        folder = self._bundles[name]
        paths = (Path(where) / file for where, _, files in os.walk(folder) for file in files)
        return {path.relative_to(folder).as_posix(): _stamp(path) for path in paths}


def _stamp(path: Path) -> Stamp:
    """What changes when a file is replaced or written."""
    try:
        found = path.stat()
    except OSError:
        return GONE
    return found.st_mtime_ns, found.st_ino, found.st_size
