"""Finding techniques and backends: one file, one class, named alike.

`discover("techniques")` imports every file of the folder and every entry point of the group
`accelerando.techniques`; `find("backends", "onnxruntime")` imports that one alone, which is all that the runtime
does: it reads techniques as names and knobs (`stored_recipe`).  A file must import without its heavy libraries (it
declares them in `needs` and imports them inside its methods), so one that does not import is broken, and stops the
run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerando.errors import BrokenPluginError, Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import (
    Artifact,
    Backend,
    Knob,
    Plugin,
    Recipe,
    Runner,
    Technique,
    plugin_from_json,
    snake,
)
from accelerando.signature import Signature
from accelerando.workload import Model, Samples

KINDS: Mapping[str, type[Plugin]] = MappingProxyType(
    {"techniques": Technique, "backends": Backend}  # type: ignore[type-abstract]
)


@cache
def discover(kind: str) -> Mapping[str, type[Any]]:
    """Every technique or backend by name.

    Args:
        kind: `techniques` or `backends`.

    Raises:
        BrokenPluginError: a file does not import, or does not hold exactly one class named like it.
    """
    package = importlib.import_module(f"accelerando.{kind}")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    found = {name: _class_of(f"accelerando.{kind}.{name}", kind) for name in sorted(names)}
    for entry in metadata.entry_points(group=f"accelerando.{kind}"):
        if entry.name in found:
            raise BrokenPluginError(f"{entry.value} calls itself {entry.name}, which is taken; rename it")
        found[entry.name] = _class_of(entry.value, kind)
    return MappingProxyType(found)


@cache
def find(kind: str, name: str) -> type[Any]:
    """One technique or backend by name, importing its file alone.

    Raises:
        BrokenPluginError: there is none.
    """
    if name.isidentifier() and not name.startswith("_"):
        try:
            return _class_of(f"accelerando.{kind}.{name}", kind)
        except ModuleNotFoundError:
            for entry in metadata.entry_points(group=f"accelerando.{kind}", name=name):
                return _class_of(entry.value, kind)
    raise BrokenPluginError(f"there is no {name!r} among the {kind}; the package that brings it may be missing")


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """The recipe of its JSON.

    Raises:
        BrokenPluginError: a technique, backend or knob is not known here.
    """
    steps = tuple(plugin_from_json(find("techniques", s["name"]), s) for s in data["steps"])
    return Recipe(steps, plugin_from_json(find("backends", data["backend"]["name"]), data["backend"]))


@dataclass(frozen=True)
class _Stored(Plugin):
    """What a bundle remembers of a plugin: its name, its knobs, and how it prints."""

    data: tuple[tuple[str, Knob], ...]
    text: str
    why: str = ""

    @property
    def name(self) -> str:
        return str(dict(self.data)["name"])

    @property
    def knobs(self) -> dict[str, Knob]:
        return {k: v for k, v in self.data if k != "name"}

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return self._absent()

    def _absent(self) -> RefusalError:
        return RefusalError(Reason.MISSING_PACKAGE, self.why or f"{self.name} is known by its name and knobs only")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class StoredTechnique(_Stored, Technique):
    """A technique as a bundle remembers it: the runtime reads recipes without importing any technique's code."""

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Technique]:
        return ()

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        raise self._absent()


@dataclass(frozen=True)
class StoredBackend(_Stored, Backend):
    """A backend that a bundle names and that is not known here: the other rungs go on without it."""

    takes = frozenset()

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Backend]:
        return ()

    def compile(self, model: Model, folder: Path) -> Artifact:
        raise self._absent()

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        raise self._absent()


def stored_recipe(data: Mapping[str, Any], texts: Sequence[str] | None = None) -> Recipe:
    """The recipe of its JSON, without importing a technique; its key is that of the real one.

    The backend is the real one, for it is needed to load; a `StoredBackend` says why where it is not known here.

    Args:
        texts: how each step and the backend print; without it, with every knob.
    """
    plain = [*data["steps"], data["backend"]]
    texts = texts or [_text(part) for part in plain]
    steps = tuple(StoredTechnique(tuple(s.items()), text) for s, text in zip(data["steps"], texts, strict=False))
    backend: Backend
    try:
        backend = plugin_from_json(find("backends", data["backend"]["name"]), data["backend"])
    except BrokenPluginError as error:
        backend = StoredBackend(tuple(data["backend"].items()), texts[-1], str(error))
    return Recipe(steps, backend)


def _text(data: Mapping[str, Knob]) -> str:
    knobs = ", ".join(f"{k}={v}" for k, v in data.items() if k != "name")
    return f"{data['name']}({knobs})" if knobs else str(data["name"])


def _class_of(module_name: str, kind: str) -> type[Any]:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name == module_name:
            raise
        raise BrokenPluginError(
            f"{module_name} does not import ({error}); import heavy libraries inside methods"
        ) from error
    except Exception as error:
        raise BrokenPluginError(f"{module_name} does not import: {type(error).__name__}: {error}") from error
    stem = module_name.rpartition(".")[2]
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and c.__module__ == module.__name__
        and issubclass(c, KINDS[kind])
        and not inspect.isabstract(c)
    ]
    if [snake(c.__name__) for c in classes] != [stem]:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise BrokenPluginError(f"{module_name} must hold one concrete class named like its file, but holds: {names}")
    return classes[0]
