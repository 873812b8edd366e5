"""The workshop: the child process in which recipes are built.

It lives on from recipe to recipe, so that heavy libraries are imported once and shared steps are done once; a
crash costs the recipe in hand, and the next one gets a new workshop.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.measure.arm import open_samples
from accelerando.measure.child import Child, say
from accelerando.memory import kept_within
from accelerando.plugins import recipe_from_json
from accelerando.recipe import Artifact, Recipe, Stage, Technique
from accelerando.search.head_start import HeadStart, front_key
from accelerando.workload import Form, Model, Samples, Workload, with_lessons


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
        head_start: what an earlier search taught, for recipes that go on from there.
    """

    def __init__(
        self,
        workload: Workload,
        machine: Machine,
        folder: Path,
        data: Path,
        memory_limit: int | None,
        head_start: HeadStart | None = None,
    ) -> None:
        self._workload, self._machine, self._head_start = workload, machine, head_start
        self._folder, self._data, self._memory_limit = folder, data, memory_limit
        self._child: Child | None = None

    def build(
        self, recipe: Recipe, into: Path, timeout: float, heard: Callable[[str], None] = lambda text: None
    ) -> Built:
        """Build a recipe into a folder, which must not be there yet.

        Args:
            timeout: seconds after which the recipe is given up.
            heard: told how a long step goes on.

        Raises:
            RefusalError: a step refused or crashed; its `step` says which one.
        """
        child = self._open()
        into.mkdir(parents=True)
        return child.call(_build, recipe.to_json(), str(into), timeout=timeout, heard=heard)

    def _open(self) -> Child:
        if self._child is None or not self._child.alive:
            self.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            self._child = Child("the workshop", self._memory_limit)
            load = self._workload
            owner = (load.metric, load.loss, load.augment) if load.train is not None else None
            folders = str(self._folder), str(self._data)
            self._child.call(_open, load.model, self._machine, *folders, owner, self._head_start, self._memory_limit)
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
    head_start: HeadStart | None
    memory_limit: int | None
    done: dict[str, Model] = field(default_factory=dict)  # by key of the steps so far
    students: dict[str, Model] = field(default_factory=dict)  # likewise: those of an earlier search


_bench: list[_Bench] = []  # the one workload of this process


def _open(
    model: Model,
    machine: Machine,
    folder: str,
    data: str,
    owner: tuple[Any, Any, Any] | None,
    head_start: HeadStart | None,
    memory_limit: int | None,
) -> None:
    rows = Path(data)
    if owner is not None and model.form is Form.TORCH:
        train, watch = open_samples(rows / "train"), open_samples(rows / "select")
        model = with_lessons(model, train, watch, owner, Path(folder).parent / "lessons", say)
    _bench.append(_Bench(model, machine, Path(folder), open_samples(rows / "calibrate"), head_start, memory_limit))


def _profile(seconds: float) -> dict[str, Any]:
    from accelerando.profile.portrait import Profile

    return Profile.take(_bench[0].model, _bench[0].data, _bench[0].machine, seconds=seconds).to_json()


def _build(recipe_json: dict[str, Any], into: str) -> Built:
    return _built(recipe_from_json(recipe_json), Path(into))


def _built(recipe: Recipe, into: Path) -> Built:
    bench = _bench[0]
    known = bench.head_start.known(recipe.steps) if bench.head_start and bench.model.lessons else 0
    model = _student(recipe.steps[:known], bench) if known else bench.model
    for i, step in enumerate(recipe.steps[known:], known):
        key = front_key(recipe.steps[: i + 1])
        if key not in bench.done:
            bench.done[key] = _applied(i, step, _with_checkpoints(model, key), bench, key)
        model = bench.done[key]
    return _at(len(recipe.steps), lambda: _compile(recipe, model, bench, into))


def _student(steps: Sequence[Technique], bench: _Bench) -> Model:
    """The student that an earlier search had after these steps; where it can't be had, it is not asked for again."""
    key = front_key(steps)
    if key not in bench.students:
        assert bench.head_start is not None

        def cut(i: int, model: Model) -> Model:
            return _applied(i, steps[i], model, bench, f"{key}-{i}")

        try:
            bench.students[key] = _at(len(steps), lambda: bench.head_start.student(steps, bench.model, cut))
        except RefusalError:
            bench.head_start = bench.head_start.without(steps)
            raise
    return bench.students[key]


def _applied(number: int, step: Technique, model: Model, bench: _Bench, name: str) -> Model:
    """The model after a step, whose files go into a new folder of this name."""
    folder = bench.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return _at(number, lambda: _apply(step, model, bench, folder))


def _with_checkpoints(model: Model, key: str) -> Model:
    """What is learned in a step is kept under the key of all steps up to it."""
    if model.lessons is None:
        return model
    folder = _bench[0].folder.parent / "lessons" / key
    return replace(model, lessons=replace(model.lessons, folder=folder))


def _apply(step: Any, model: Model, bench: _Bench, folder: Path) -> Model:
    if refusal := step.refuse(model, bench.machine):
        raise refusal
    with kept_within(bench.memory_limit if step.stage is Stage.HEAL else None):  # a lesson goes on with fewer rows
        return step.apply(model, bench.data, folder)


def _compile(recipe: Recipe, model: Model, bench: _Bench, into: Path) -> Built:
    if refusal := recipe.backend.refuse(model, bench.machine):
        raise refusal
    log = model.log
    for i, member in enumerate(recipe.backend.members):
        (into / str(i)).mkdir()
        log += _built(member, into / str(i)).log
    return Built(recipe.backend.compile(model, into), log)


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
