"""The head start of a refresh: its lessons go on from the students of the bundle that was made for the old weights.

Which layers and channels a cut takes away follows from the weights that it is given.  So a recipe's cuts are made once
more on the weights that they were made on, which the bundle holds: those of the original, and those that each lesson
before a cut ended with.  What comes out has the old students' structure, takes the last one's weights, and goes on
from there with the new original for a teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerando.bundle import Bundle
from accelerando.errors import Reason, RefusalError
from accelerando.ladder import Ladder
from accelerando.recipe import File, Stage, Technique, key_of
from accelerando.train.checkpoint import best_of, finished
from accelerando.train.weights import fit, put
from accelerando.workload import Form, Model

ORIGINAL = key_of([])  # the key of no steps: the weights that the first cut was made on
WEIGHTS = "weights.safetensors"  # of a torch original, as its backend writes them
TOLD = ("distil: as the lesson of the bundle that was refreshed left it", "distil: curve not drawn again")

Apply = Callable[[int, Model], Model]


@dataclass(frozen=True)
class HeadStart:
    """Weights of an earlier search.

    Args:
        original: those that the first cut was made on, a state dict.
        students: those that lessons ended with, by the key of all steps up to the lesson.
    """

    original: Path
    students: Mapping[str, Path]

    @classmethod
    def of(cls, bundle: Bundle) -> HeadStart | None:
        """What a bundle holds, whose hashes were checked when it was opened; None where it holds no student."""
        paths = bundle.students
        original = paths.get(ORIGINAL) or bundle.folder(bundle.ladder.rungs[0]) / WEIGHTS
        students = {key: path for key, path in paths.items() if key != ORIGINAL}
        return cls(original, students) if students and original.is_file() else None

    def known(self, steps: Sequence[Technique]) -> int:
        """How many of the steps end with a student that can be had again, and goes on to be taught; 0 for none."""
        for count in range(len(steps) - 1, 0, -1):
            taught = _heals(steps[count - 1]) and _heals(steps[count])
            if taught and all(key in self.students for key in lesson_keys(steps[:count])):
                return count
        return 0

    def without(self, steps: Sequence[Technique]) -> HeadStart:
        """The others, where the student after these steps can't be had again."""
        gone = front_key(steps)
        return replace(self, students={key: path for key, path in self.students.items() if key != gone})

    def student(self, steps: Sequence[Technique], model: Model, apply: Apply) -> Model:
        """The student after all of these steps, with the lessons of the model that it is to learn from now.

        Args:
            model: the new original.
            apply: applies the step of this number to a model.

        Raises:
            RefusalError: UNSUPPORTED: a cut does not come out as it did; or a cut refuses.
        """
        model = replace(model, content=_restored(model.content, self.original))
        for number, step in enumerate(steps):
            if not _heals(step):
                model = apply(number, model)
                continue
            path = self.students.get(front_key(steps[: number + 1]))  # a lesson that goes on at once left none
            content = model.content if path is None else _as_taught(model.content, path)
            model = model.changed(Form.TORCH, content, *TOLD)
        return model


def lesson_keys(steps: Sequence[Technique]) -> Iterator[str]:
    """The key of all steps up to each lesson that another lesson does not follow at once."""
    for i, step in enumerate(steps):
        if _heals(step) and not (i + 1 < len(steps) and _heals(steps[i + 1])):
            yield front_key(steps[: i + 1])


def front_key(steps: Sequence[Technique]) -> str:
    return key_of([step.to_json() for step in steps])


def students_of(ladder: Ladder, lessons: Path, before: Bundle | None, given: HeadStart | None) -> dict[str, Path]:
    """Where the weights lie that lessons of a ladder's recipes ended with, by key, as far as they are there.

    Args:
        lessons: the folder of this search's own.
        before: an earlier bundle of the same search.
        given: the head start of this search, if it had one: the weights that its first cut was made on go along.
    """
    earlier = {**(given.students if given else {}), **(_whole(before) if before else {})}
    fronts = [m.steps for rung in ladder.rungs for m in (rung.recipe.backend.members or (rung.recipe,))]
    keys = {key for steps in fronts for key in lesson_keys(steps)}
    found = {key: path for key in keys if (path := finished(lessons / key) or earlier.get(key))}
    if given is not None and any(given.known(steps) for steps in fronts):
        found[ORIGINAL] = given.original
    elif found and ORIGINAL in earlier:
        found[ORIGINAL] = earlier[ORIGINAL]
    return found


def _whole(bundle: Bundle) -> dict[str, Path]:
    """A bundle's students, without damaged ones, which writing them again would make look whole."""
    files = {file.path: file for file in bundle.student_files}
    return {
        key: path
        for key, path in bundle.students.items()
        if path.is_file() and File.of(path, bundle.path) == files[path.relative_to(bundle.path).as_posix()]
    }


def _heals(step: Technique) -> bool:
    return getattr(step, "stage", None) is Stage.HEAL  # one that is not known here has no stage


def _restored(module: Any, path: Path) -> Any:
    """A copy of the module with the weights of its file.

    Raises:
        RefusalError: UNSUPPORTED: they are another module's.
    """
    import copy

    from safetensors import SafetensorError, safe_open

    module = copy.deepcopy(module)
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
            state |= {name: state[first] for name, first in (file.metadata() or {}).items() if first in state}
        extra = {k: v for k, v in module.state_dict().items() if not hasattr(v, "data_ptr")}
        module.load_state_dict({**extra, **state}, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RefusalError(
            Reason.UNSUPPORTED, f"the weights that it was cut on can't be had again: {str(error)[:300]}"
        ) from error
    return module


def _as_taught(module: Any, path: Path) -> Any:
    """A copy of the module with the weights that a lesson ended with.

    Raises:
        RefusalError: UNSUPPORTED: it has other tensors, or tensors of other shapes, than the student had.
    """
    import copy

    weights = best_of(path)
    module = copy.deepcopy(module)
    if not fit(module, weights):
        raise RefusalError(
            Reason.UNSUPPORTED,
            "cut again, it is not built like the student that was taught: the data, or what was measured, is another",
        )
    put(module, weights)
    return module
