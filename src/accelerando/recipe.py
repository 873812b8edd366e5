"""A recipe: techniques in order, then a backend with its settings.  Plain data, with a stable key.

A technique or a backend is a frozen dataclass whose fields are its knobs (bool, int, float, str or None), in a
file of its own under `techniques/` or `backends/`; `plugins.discover()` finds it.  Compatibility is derived from
the forms and stages that they declare, never from lists of each other.  The original is a recipe too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from accelerando.errors import BrokenPluginError, Reason, RefusalError
from accelerando.machine import Machine
from accelerando.signature import Array, Signature
from accelerando.workload import Form, Model, Samples

Knob = bool | int | float | str | None
AnyPlugin = TypeVar("AnyPlugin", bound="Plugin")


class Stage(IntEnum):
    """When a technique is applied.

    A recipe's stages never go back, but that SHAPE and HEAL may alternate: a model is narrowed in steps.
    """

    SHAPE = 0  # structure
    HEAL = 1  # retraining
    LOWER = 2  # export, exact rewrites
    QUANTIZE = 3  # fewer bits
    PACK = 4  # layout on disk


@dataclass(frozen=True)
class File:
    """One file of an artifact: its path within the artifact's folder, `/` between parts, its size and hash."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, folder: Path) -> File:
        """Describe a file that lies in a folder."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else _hash(stream)
        return cls(path.relative_to(folder).as_posix(), path.stat().st_size, digest.hexdigest())


def _hash(stream: Any) -> Any:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest


@dataclass(frozen=True)
class Artifact:
    """What a backend's `compile` leaves in a folder: every file that `load` will read, described."""

    files: tuple[File, ...]

    @classmethod
    def gather(cls, folder: Path) -> Artifact:
        """All files below a folder, in order of path."""
        return cls(tuple(File.of(p, folder) for p in sorted(folder.rglob("*")) if p.is_file()))

    @property
    def bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    def to_json(self) -> list[dict[str, Any]]:
        return [dataclasses.asdict(f) for f in self.files]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> Artifact:
        return cls(tuple(File(**f) for f in data))


class Runner(ABC):
    """A loaded model.  Not thread-safe unless its backend says so."""

    @abstractmethod
    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        """Answer one batch: flat inputs to flat outputs, both in the signature's order.

        Done when the results are ready: accelerators are synchronised inside.
        """

    def close(self) -> None:  # noqa: B027  most runners hold nothing that Python does not free
        """Give back what garbage collection would not."""


class Plugin(ABC):
    """What techniques and backends share: a name, knobs, what they need."""

    needs: ClassVar[tuple[str, ...]] = ()  # import names; the run goes on without the plugin where one is missing
    typical_seconds: ClassVar[float] = 3.0  # what it takes on a small model; the search weighs it until it has measured

    @property
    def expected_seconds(self) -> float:
        """What it will take with these knobs, as far as it knows."""
        return self.typical_seconds

    @property
    def name(self) -> str:
        return snake(type(self).__name__)

    @property
    def knobs(self) -> dict[str, Knob]:
        """The settings by name, in the order of their definition."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def with_knobs(self: AnyPlugin, **knobs: Knob) -> AnyPlugin:
        """The same with some knobs turned."""
        return dataclasses.replace(self, **knobs)  # type: ignore[type-var]

    @classmethod
    def missing(cls) -> tuple[str, ...]:
        """Which of `needs` can't be imported here.  Imports nothing."""
        return tuple(name for name in cls.needs if not _findable(name))

    @abstractmethod
    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        """Why not, or None.

        Asked with the original when planning (so answer None where the form is not the one that is taken), and
        with the model at hand just before it is applied or compiled.
        """

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.knobs}

    def __str__(self) -> str:
        """The name, and the knobs that are not at their defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


class Technique(Plugin):
    """Changes a model.  Subclasses are frozen dataclasses; every field is a knob with a default.

    One of the stage SHAPE has a knob `share`: the share, between 0 and 1, of what it cuts that it takes away.  The
    search turns it until the speed is the one that is wanted.  One that adds has `width` and `depth`: times, above 1.
    """

    takes: ClassVar[Form]
    gives: ClassVar[Form]
    stage: ClassVar[Stage]
    exact: ClassVar[bool] = False  # the same function within float tolerance: verified, and refused where it is not
    wants: ClassVar[str] = ""  # what a backend must offer for this to pay, such as "sparse products"; "" for nothing

    @classmethod
    @abstractmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        """Settings worth trying, the most promising first.  Cheap: `model` is the original, in whatever form."""

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return None

    @abstractmethod
    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        """The changed model; files go into `folder`, which is empty.

        Never changes its input.  `data` is the calibration split, never the judge's.

        Raises:
            RefusalError: this model can't be changed in this way; the reason says why.
        """


class Backend(Plugin):
    """Compiles and runs a model.  Subclasses are frozen dataclasses; every field is a knob with a default."""

    takes: ClassVar[frozenset[Form]]
    portable: ClassVar[bool] = True  # artifacts run without the user's own code; if not, recipes have no steps
    offers: ClassVar[frozenset[str]] = frozenset()  # what techniques may want of it
    steady: ClassVar[bool] = True  # inputs of one shape take the same time, whatever they hold
    settings: ClassVar[Mapping[str, Knob]] = MappingProxyType({})  # of this process (`here`): no part of a recipe

    @classmethod
    @abstractmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Backend]:
        """Settings worth trying, the defaults first."""

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return None

    @property
    def members(self) -> tuple[Recipe, ...]:
        """Recipes that this backend runs together; their files lie in `0/`, `1/`, ... when `compile` is called."""
        return ()

    def here(self, **settings: Knob) -> Backend:
        """The same for this process alone: its key, its text and what equals it are those of its knobs.

        Args:
            settings: those that are knobs, such as `spinning=False`, are turned.  All are in `settings`, where `load`
                finds what is no knob, such as `shared=True`; one that the backend does not know is left.
        """
        mine = self.with_knobs(**{k: v for k, v in settings.items() if k in self.knobs})
        object.__setattr__(mine, "settings", MappingProxyType(settings))
        return mine

    def with_members(self, members: Sequence[Recipe]) -> Backend:
        """The same with other members.

        Raises:
            BrokenPluginError: this backend has none.
        """
        raise BrokenPluginError(f"{self.name} runs no other recipes")

    @abstractmethod
    def compile(self, model: Model, folder: Path) -> Artifact:
        """Write everything that `load` needs into an empty folder."""

    @abstractmethod
    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        """Bring it to life in this process: the only method that the runtime calls.

        Args:
            skeleton: the user's own module, which a backend that is not `portable` needs and others ignore.
        """


@dataclass(frozen=True, eq=False)
class Recipe:
    """Techniques in order, then a backend.

    Two recipes are equal when their keys are: one that was read from a bundle, whose techniques are names and knobs
    only (`plugins.StoredTechnique`), equals the one from which it was written.

    Raises:
        BrokenPluginError: a step is not a technique, or the backend not a backend.
    """

    steps: tuple[Technique, ...]
    backend: Backend

    def __post_init__(self) -> None:
        wrong = [s for s in self.steps if not isinstance(s, Technique)]
        if wrong or not isinstance(self.backend, Backend):
            raise BrokenPluginError(f"a recipe is techniques, then a backend, but got {wrong or self.backend!r}")

    @cached_property
    def key(self) -> str:
        """A stable hash of the recipe's JSON: 12 hexadecimal digits."""
        return key_of(self.to_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        """Why this recipe can't be for this model here, as far as planning can tell; or None."""
        form, stage = model.form, Stage.SHAPE
        for part in (*self.steps, self.backend):
            if missing := part.missing():
                return RefusalError(Reason.MISSING_PACKAGE, f"{part.name} needs {', '.join(missing)}")
            if isinstance(part, Technique):
                if part.takes is not form or (part.stage < stage and stage > Stage.HEAL):
                    return RefusalError(
                        Reason.WRONG_FORM, f"{part.name} takes {part.takes.value}, but is given {form.value}"
                    )
                form, stage = part.gives, part.stage
            elif isinstance(part, Backend) and form not in part.takes:
                return RefusalError(Reason.WRONG_FORM, f"{part.name} does not take {form.value}")
            if refusal := part.refuse(model, machine):
                return refusal
        return None

    def to_json(self) -> dict[str, Any]:
        return {"steps": [s.to_json() for s in self.steps], "backend": self.backend.to_json()}

    def __str__(self) -> str:
        return " > ".join(map(str, (*self.steps, self.backend)))


def key_of(data: Any) -> str:
    """The stable hash of plain data: sorted, compact JSON, SHA-256, 12 digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]


def plugin_from_json(kind: type[Any], data: Mapping[str, Any]) -> Any:
    """A technique or backend of this class with the knobs of its JSON.

    Raises:
        BrokenPluginError: a knob is unknown to this version of the class, or has a value that it does not take.
    """
    knobs = {k: v for k, v in data.items() if k != "name"}
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := knobs.keys() - known:
        raise BrokenPluginError(
            f"{data['name']} has no knob {sorted(unknown)[0]!r} in this version; it has {sorted(known)}"
        )
    try:
        return kind(**knobs)
    except (TypeError, ValueError) as error:
        raise BrokenPluginError(f"{data['name']} does not take its knobs in this version: {error}") from error


@cache
def snake(name: str) -> str:
    """`ExportOnnx` -> `export_onnx`: how a class is named after its file."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _findable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
