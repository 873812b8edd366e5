"""What both contracts ask of a plugin, be it a technique or a backend.

Each function raises AssertionError with what was expected and what was found.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from accelerando.errors import BrokenPluginError
from accelerando.recipe import Plugin, plugin_from_json, snake
from accelerando.signature import Array, Port

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "transformers", "sklearn", "pandas")
TOLERANCE = 1e-3  # of an answer's largest value: float32 in another order stays a hundred times below
ROWS = (1, 2, 5)
KNOBS = (bool, int, float, str, type(None))


def ensure_frozen(plugin: Plugin) -> None:
    """It is a frozen dataclass whose fields are knobs with defaults."""
    assert dataclasses.is_dataclass(type(plugin)), f"{plugin.name} must be a dataclass"
    for field in dataclasses.fields(type(plugin)):  # type: ignore[arg-type]
        assert field.default is not dataclasses.MISSING, f"the knob {field.name!r} needs a default"
        assert isinstance(field.default, KNOBS), f"the knob {field.name!r} must be plain data"
    try:
        setattr(plugin, "needs", plugin.needs)  # noqa: B010  mypy knows that it can't be set
    except dataclasses.FrozenInstanceError:
        return
    raise AssertionError(f"{plugin.name} can be changed: the dataclass must be frozen")


def ensure_kept_as_json(kind: type[Plugin], plugins: Iterable[Plugin]) -> None:
    """Settings come back from their JSON equal and with the same hash; an unknown knob is refused."""
    for plugin in plugins:
        again = plugin_from_json(kind, json.loads(json.dumps(plugin.to_json())))
        assert again == plugin, f"{plugin} came back from its JSON as {again}"
        assert hash(again) == hash(plugin), f"{plugin} came back from its JSON with another hash"
    try:
        plugin_from_json(kind, {"name": snake(kind.__name__), "no_such_knob": 1})
    except BrokenPluginError:
        return
    raise AssertionError("an unknown knob was taken")


def ensure_choices(kind: type[Plugin], choices: Sequence[Plugin]) -> None:
    """The settings worth trying start with the defaults and hold none twice."""
    assert choices, "there must be at least one choice, the defaults"
    assert choices[0] == kind(), f"the first choice must be the defaults, but is {choices[0]}"
    assert all(type(c) is kind for c in choices), f"choices must be of {kind.__name__}"
    twice = [str(c) for i, c in enumerate(choices) if c in choices[:i]]
    assert not twice, f"these choices come twice: {twice}"


def ensure_named_like_its_file(kind: type[Plugin]) -> None:
    stem = kind.__module__.rpartition(".")[2]
    assert snake(kind.__name__) == stem, f"{kind.__name__} must lie in {snake(kind.__name__)}.py, not {stem}.py"


def ensure_lean_import(kind: type[Plugin]) -> None:
    """Importing the plugin's file brings none of the heavy libraries: the runtime must start at once."""
    code = f"import sys, {kind.__module__}; print(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"importing it also imports {done.stdout.split()}; import those inside methods"


def ensure_answers(
    ports: Sequence[Port], expected: Sequence[Array], got: Sequence[Array], what: str, exactly: str
) -> None:
    """Answers are finite, in the signature's types and shapes, and as exact as they must be.

    Args:
        what: that was asked, for the messages.
        exactly: why they must be what is expected; empty where they need not.
    """
    assert len(got) == len(ports), f"{len(got)} outputs came, but {len(ports)} are in the signature"
    for port, want, have in zip(ports, expected, got, strict=True):
        assert port.fits(have), f"{port} was answered with {have.dtype}{have.shape} for {what}"
        assert have.shape == want.shape, f"{port.name} has shape {have.shape}, but the original's is {want.shape}"
        wide = want.astype(np.float64)
        off = float(np.abs(have.astype(np.float64) - wide).max(initial=0.0))
        assert np.isfinite(off), f"{port.name} is not finite"
        allowed = TOLERANCE * max(float(np.abs(wide).max(initial=0.0)), 1e-6) if want.dtype.kind == "f" else 0.0
        far = f"{port.name} is off by {off:.3g} for {what}; {allowed:.3g} is allowed"
        assert not exactly or off <= allowed, f"{exactly}, but {far}"
