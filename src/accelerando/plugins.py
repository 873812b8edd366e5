"""Finding techniques and backends: one file, one class, named alike.

`discover("techniques")` imports every file of the folder and every entry point of the group
`accelerando.techniques`; `find("backends", "onnxruntime")` imports that one alone, which is all that the runtime
does.  A file must import without its heavy libraries (it declares them in `needs` and imports them inside its
methods), so a file that does not import is broken, and stops the run.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import Any

from accelerando.errors import BrokenPluginError
from accelerando.recipe import Backend, Plugin, Recipe, Technique, plugin_from_json, snake

KINDS: Mapping[str, type[Plugin]] = MappingProxyType({"techniques": Technique, "backends": Backend})


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
        raise BrokenPluginError(
            f"{module_name} must hold one concrete class named like its file, but holds: {names}"
        )
    return classes[0]
