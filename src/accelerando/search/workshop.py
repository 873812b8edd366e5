"""The workshop: the child process in which recipes are built.

It lives on from recipe to recipe, so that heavy libraries are imported once and shared steps are done once; a
crash costs the recipe in hand, and the next one gets a new workshop.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.measure.arm import open_samples
from accelerando.measure.child import Child
from accelerando.plugins import recipe_from_json
from accelerando.recipe import Artifact, Recipe, key_of
from accelerando.workload import Model, Samples, Workload


@dataclass(frozen=True)
class Built:
    """What came out of the workshop: the files, and what the techniques said."""

    artifact: Artifact
    log: tuple[str, ...]


class Workshop:
    """Builds recipes of one workload.

    Args:
        workload: its model travels to the child by a private pipe; nothing of it is pickled to disk.
        machine: this one.
        folder: for intermediate files; the workshop's own, may be deleted afterwards.
        data: folder with the splits.
        memory_limit: bytes, or None.
    """

    def __init__(
        self, workload: Workload, machine: Machine, folder: Path, data: Path, memory_limit: int | None
    ) -> None:
        self._model, self._machine = workload.model, machine
        self._folder, self._data, self._memory_limit = folder, data, memory_limit
        self._child: Child | None = None

    def build(self, recipe: Recipe, into: Path, timeout: float) -> Built:
        """Build a recipe into a folder, which must not be there yet.

        Raises:
            RefusalError: a step refused or crashed; its `step` says which one.
        """
        child = self._open()
        into.mkdir(parents=True)
        return child.call(_build, recipe.to_json(), str(into), timeout=timeout)

    def _open(self) -> Child:
        if self._child is None or not self._child.alive:
            self.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._child = Child("the workshop", self._memory_limit)
            self._child.call(_open, self._model, self._machine, str(self._folder), str(self._data / "calibrate"))
        return self._child

    def profile(self, seconds: float) -> dict[str, Any]:
        """The original's profile as plain data, taken in the child.

        Raises:
            RefusalError: it can't be profiled.
        """
        return self._open().call(_profile, seconds, timeout=1.5 * seconds + 5)

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


# --- in the child -----------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    model: Model
    machine: Machine
    folder: Path
    data: Samples
    done: dict[str, Model] = field(default_factory=dict)  # by key of the steps so far


_bench: list[_Bench] = []  # the one workload of this process


def _open(model: Model, machine: Machine, folder: str, calibrate: str) -> None:
    _bench.append(_Bench(model, machine, Path(folder), open_samples(Path(calibrate))))


def _profile(seconds: float) -> dict[str, Any]:
    from accelerando.profile.portrait import Profile

    return Profile.take(_bench[0].model, _bench[0].data, _bench[0].machine, seconds=seconds).to_json()


def _build(recipe_json: dict[str, Any], into: str) -> Built:
    recipe, bench = recipe_from_json(recipe_json), _bench[0]
    model = bench.model
    for i, step in enumerate(recipe.steps):
        key = key_of([s.to_json() for s in recipe.steps[: i + 1]])
        if key not in bench.done:
            folder = bench.folder / key
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            bench.done[key] = _at(i, lambda s=step, m=model, f=folder: _apply(s, m, bench, f))
        model = bench.done[key]
    last = len(recipe.steps)
    return _at(last, lambda: _compile(recipe, model, bench, Path(into)))


def _apply(step: Any, model: Model, bench: _Bench, folder: Path) -> Model:
    if refusal := step.refuse(model, bench.machine):
        raise refusal
    return step.apply(model, bench.data, folder)


def _compile(recipe: Recipe, model: Model, bench: _Bench, into: Path) -> Built:
    if refusal := recipe.backend.refuse(model, bench.machine):
        raise refusal
    return Built(recipe.backend.compile(model, into), model.log)


def _at(step: int, work: Any) -> Any:
    """Do a step's work; whatever goes wrong is known to be that step's."""
    try:
        return work()
    except RefusalError as error:
        error.step = step
        raise
    except MemoryError as error:
        refusal = RefusalError(Reason.OUT_OF_MEMORY, "it could not get the memory that it asked for")
        refusal.step = step
        raise refusal from error
    except OSError as error:
        raise _blame(Reason.NO_ROOM if error.errno == 28 else Reason.CRASHED, error, step) from error
    except Exception as error:
        raise _blame(Reason.CRASHED, error, step) from error


def _blame(reason: Reason, error: Exception, step: int) -> RefusalError:
    refusal = RefusalError(reason, f"{type(error).__name__}: {str(error)[:1000]}")
    refusal.step = step
    return refusal
