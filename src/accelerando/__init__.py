"""Finds, proves and ships the fastest faithful version of a trained model.

    result = accelerando.accelerate(model, data=(x, y), goal="speedup >= 4, drop <= 1%", into="bundle/")
    fast = accelerando.load("bundle/")

Names load on first use: importing the package imports nothing else, and `load` none of the search.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerando.bundle import Bundle
    from accelerando.errors import (
        AccelerandoError,
        BundleError,
        DataError,
        GoalError,
        MissingExtraError,
        ModelError,
        Reason,
        RefusalError,
        ServingError,
        UsageError,
    )
    from accelerando.goal import Goal
    from accelerando.interval import Interval
    from accelerando.machine import Machine
    from accelerando.pipeline import accelerate
    from accelerando.recipe import Backend, Recipe, Technique
    from accelerando.renewal import refresh
    from accelerando.serve.governed import GovernedModel
    from accelerando.serve.runtime import FastModel, MachineWarning, load

    __version__: str

__all__ = [
    "AccelerandoError",
    "Backend",
    "Bundle",
    "BundleError",
    "DataError",
    "FastModel",
    "Goal",
    "GoalError",
    "GovernedModel",
    "Interval",
    "Machine",
    "MachineWarning",
    "MissingExtraError",
    "ModelError",
    "Reason",
    "Recipe",
    "RefusalError",
    "ServingError",
    "Technique",
    "UsageError",
    "__version__",
    "accelerate",
    "load",
    "refresh",
]

_HOMES = {
    "accelerate": "pipeline",
    "refresh": "renewal",
    "Bundle": "bundle",
    "Goal": "goal",
    "Interval": "interval",
    "Machine": "machine",
    **dict.fromkeys(("Backend", "Recipe", "Technique"), "recipe"),
    "GovernedModel": "serve.governed",
    **dict.fromkeys(("FastModel", "MachineWarning", "load"), "serve.runtime"),
    **dict.fromkeys(("AccelerandoError", "BundleError", "DataError", "GoalError", "MissingExtraError"), "errors"),
    **dict.fromkeys(("ModelError", "Reason", "RefusalError", "ServingError", "UsageError"), "errors"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("accelerando")
    elif name in _HOMES:
        value = getattr(import_module(f"accelerando.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"accelerando has no {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
