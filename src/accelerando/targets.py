"""What a command line names: `model.py:build`, `data.py:load`, `samples.npz`, `model.onnx`."""

from __future__ import annotations

import importlib
import sys
import traceback
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.errors import UsageError

INPUTS, TARGETS = ("x", "inputs", "input", "data"), ("y", "targets", "labels", "target", "label")


def find_target(target: str) -> Any:
    """The function of `file.py:function` or `package.module:function`.

    The file's folder goes to the front of the path, so that its own imports work, here and in child processes.

    Raises:
        UsageError: it does not import or is not there; the message holds its own error.
    """
    place, _, name = target.partition(":")
    if not name:
        raise UsageError(f"{target!r} must be FILE.py:FUNCTION or MODULE:FUNCTION, such as model.py:build")
    module_name = place
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise UsageError(f"{place} is not a file (in {Path.cwd()})")
        module_name = path.stem
        sys.path.insert(0, str(path.parent))
    elif "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"{place} does not import: {_told(error)}") from error
    if place.endswith(".py") and Path(module.__file__ or "").resolve() != Path(place).resolve():
        raise UsageError(f"another module is called {module_name!r} ({module.__file__}); give {place} another name")
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(k for k, v in vars(module).items() if callable(v) and not k.startswith("_")) or "no functions"
        raise UsageError(f"{place} has no function {name!r}; it has {there}")
    return function


def call_target(target: str) -> Any:
    """What the function of a target gives.

    Raises:
        UsageError: it does not import, is not there, or raises.
    """
    function = find_target(target)
    try:
        return function()
    except Exception as error:
        raise UsageError(f"{target} failed: {_told(error)}") from error


def read_model(target: str) -> Any:
    """A model: the path of an .onnx file as it is, else what the target's function gives."""
    return target if target.endswith(".onnx") else call_target(target)


def read_data(target: str) -> Any:
    """Data: an .npz file, or what the target's function gives.

    In an .npz the inputs are `x` (or `inputs`), or else every array by its own name; the targets are `y`
    (or `targets`, `labels`), where they are there.
    """
    if not target.endswith(".npz"):
        return call_target(target)
    arrays = read_npz(target)
    targets = next((arrays.pop(k) for k in TARGETS if k in arrays), None)
    single = next((k for k in INPUTS if k in arrays), None)
    inputs: Any = arrays[single] if single and len(arrays) == 1 else arrays
    return inputs if targets is None else (inputs, targets)


def read_npz(path: str | Path) -> dict[str, Any]:
    """Every array of an .npz file by name; nothing pickled is read.

    Raises:
        UsageError: it is not one, or holds objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} can't be read as an .npz file of plain arrays: {error}") from error
    if not arrays:
        raise UsageError(f"{path} holds no arrays")
    return arrays


def match_names(arrays: dict[str, Any], names: list[str], where: str) -> list[Any]:
    """The arrays in the order of the names; a single array fits a single name, whatever it is called.

    Raises:
        UsageError: one is missing or unknown.
    """
    if len(arrays) == len(names) == 1:
        return list(arrays.values())
    if unknown := sorted(arrays.keys() - set(names)):
        raise UsageError(f"{where} holds {unknown[0]!r}, but the model takes {', '.join(names)}")
    if missing := [n for n in names if n not in arrays]:
        raise UsageError(f"{where} does not hold {missing[0]!r}; the model takes {', '.join(names)}")
    return [arrays[n] for n in names]


def _told(error: Exception) -> str:
    """An error of the user's code: its kind, its words, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
