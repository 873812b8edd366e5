"""The runtime: `load` a bundle, and call it like the model.

Nothing of the search, of any technique or of torch is imported here; of the backends only the files of those that
the bundle names, and their libraries only when a rung is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from accelerando.bundle import Bundle
from accelerando.errors import BundleError, MissingExtraError, ModelError, RefusalError, UsageError
from accelerando.interval import Interval
from accelerando.ladder import Rung
from accelerando.machine import PACKAGES
from accelerando.recipe import Recipe, Runner
from accelerando.serve.binding import Binding

if TYPE_CHECKING:
    from accelerando.goal import Goal
    from accelerando.serve.governed import GovernedModel
    from accelerando.serve.governor import Decides


class MachineWarning(UserWarning):
    """The bundle's figures were measured on another machine, or with other versions."""


@overload
def load(path: str | Path, *, rung: int | str | None = None, model: Any = None) -> FastModel: ...


@overload
def load(
    path: str | Path,
    *,
    goal: str | Goal,
    memory: str | int | None = None,
    governor: str | Decides = "balanced",
    audit: float = 0.01,
    isolated: bool = False,
    model: Any = None,
) -> GovernedModel: ...


def load(
    path: str | Path,
    *,
    rung: int | str | None = None,
    goal: str | Goal | None = None,
    model: Any = None,
    **terms: Any,
) -> FastModel | GovernedModel:
    """The fast model of a bundle, to be called like the model from which it was made.

    Without a goal it is one rung; with one, or with a term of the governor, it is the whole ladder under a governor,
    which stands on the best rung that the goal allows at each moment.

    Args:
        path: the folder.
        rung: the number of a rung on the ladder (0 is the original; -1 the fastest) or a recipe's key; without it,
            the best by the goal of those that can run here; `note` says why where that is not the bundle's best.
        goal: what is asked for while it runs, as in "p99 <= 5ms, drop <= 1%".
        model: the original module, which rungs that run its own code need.
        terms: of the governor, which is there with any of them, under the bundle's own goal where none is given:
            `memory` that the loaded rungs may hold, as in "200MB"; `governor` (`steady`, `balanced`, `responsive`, or
            an object with the same `decide`); `audit`, the share of requests that are asked of the best rung too when
            there is time; `isolated`, to compute in a process of its own; `most_rows` of a batch; `waiting_rows` that
            the queue takes; `name`.

    Raises:
        BundleError: the folder is not a bundle, is damaged, or holds no rung that can run here (`no-rung`).
        GoalError: the goal does not parse.
        UsageError: there is no such rung, or a term is not what it must be.
        MissingExtraError, ModelError, RefusalError: the rung that was asked for by name can't run here.

    Warns:
        MachineWarning: the figures were measured elsewhere.
    """
    if goal is not None or terms:
        from accelerando.serve.governed import govern

        known = govern.__kwdefaults__ or {}
        if unknown := " and no ".join(name for name in terms if name not in known):
            raise UsageError(f"load() takes no {unknown}; beside the path it takes {', '.join(known)}, rung")
        if rung is not None:
            raise UsageError("a governor chooses the rung: give rung= or goal=, not both")
        return govern(path, goal=goal, model=model, **terms)
    bundle = Bundle.open(path, hashes=False)  # the one rung that is loaded is hashed by `start`
    number, runner, note = _start(bundle, model) if rung is None else _start_named(bundle, rung, model)
    fast = FastModel(bundle, number, runner, note)
    if differences := _differences(bundle, fast.rung):
        warnings.warn(
            f"{bundle.path} was measured elsewhere ({'; '.join(differences)}): its figures may not hold here; "
            f"run `accelerando bench {bundle.path}`",
            MachineWarning,
            stacklevel=2,
        )
    return fast


class FastModel:
    """A rung of a bundle, called like the model; `Binding` says what it takes and gives.

    Not thread-safe unless the backend is (ONNX Runtime is).
    """

    def __init__(self, bundle: Bundle, number: int, runner: Runner, note: str = "") -> None:
        self.bundle = bundle
        self.number = number
        self.note = note
        self._runner: Runner | None = runner
        self._binding = Binding(bundle.signature)

    @property
    def rung(self) -> Rung:
        """Where on the ladder it stands."""
        return self.bundle.ladder.rungs[self.number]

    @property
    def recipe(self) -> Recipe:
        """How the rung was made."""
        return self.rung.recipe

    @property
    def speedup(self) -> Interval:
        """Times faster than the original, as measured on the bundle's machine."""
        return self.rung.evidence.speedup

    @property
    def drop(self) -> Interval:
        """How much worse than the original, in the metric's own unit; negative where better."""
        return self.rung.evidence.drop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answer to one batch, in the original's structure.

        Raises:
            DataError: the arguments are not those of the model, or of other types or shapes.
            UsageError: it was closed.
        """
        leaves, tensors = self._binding.leaves(args, kwargs)
        if self._runner is None:
            raise UsageError("the model was closed; load it again")
        return self._binding.answer(self._runner(leaves), tensors)

    def close(self) -> None:
        """Give back what the backend holds; calls after it raise UsageError."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def __enter__(self) -> FastModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        speed, drop = self.speedup, self.drop
        lines = [
            f"FastModel({self.recipe}), rung {self.number} of {len(self.bundle.ladder.rungs) - 1}",
            f"  {speed.mid:.2f} times faster ({speed.low:.2f} to {speed.high:.2f}), "
            f"drop {drop.mid:.4g} ({drop.low:.4g} to {drop.high:.4g}) of {self.rung.evidence.metric}",
            *(f"  takes {port}" for port in self.bundle.signature.inputs),
        ]
        return "\n".join([*lines, f"  note: {self.note}"] if self.note else lines)


# --- which rung -------------------------------------------------------------------------------------------------


def _start_named(bundle: Bundle, name: int | str, model: Any) -> tuple[int, Runner, str]:
    rungs = bundle.ladder.rungs
    keys = [r.recipe.key for r in rungs]
    if isinstance(name, str) and name in keys:
        number = keys.index(name)
    elif isinstance(name, int) and not isinstance(name, bool) and -len(rungs) <= name < len(rungs):
        number = name % len(rungs)
    else:
        there = ", ".join(f"{i} ({r.recipe.key}: {r.recipe})" for i, r in enumerate(rungs))
        raise UsageError(f"there is no rung {name!r} in {bundle.path}; give the number or the key of one: {there}")
    return number, bundle.start(rungs[number], model), ""


def _start(bundle: Bundle, model: Any) -> tuple[int, Runner, str]:
    """The best rung that can run here."""
    why: list[str] = []
    for number in _order(bundle):
        try:
            runner = bundle.start(bundle.ladder.rungs[number], model)
        except (MissingExtraError, ModelError, RefusalError) as error:
            why.append(str(error))
            continue
        note = f"not the best rung, {bundle.ladder.rungs[bundle.best].recipe}: {why[0]}" if why else ""
        return number, runner, note
    raise BundleError("no-rung", f"no rung of {bundle.path} can run here: {'; '.join(why)}")


def _order(bundle: Bundle) -> Iterable[int]:
    """The best first; then the rest as the goal likes them, and only where it is asked, for judging takes a while."""
    yield bundle.best
    rungs = bundle.ladder.rungs
    others = [i for i in range(len(rungs)) if i != bundle.best]
    yield from sorted(others, key=lambda i: bundle.goal.merit(rungs[i].evidence), reverse=True)


def _differences(bundle: Bundle, rung: Rung) -> list[str]:
    """What of this machine bears on a rung: not the versions of libraries that it does not use."""
    backend = rung.recipe.backend
    used = [backend, *(member.backend for member in getattr(backend, "stored_members", ()))]
    idle = set(PACKAGES).difference(*(b.needs for b in used))
    return [row for row in bundle.differences() if row.partition(":")[0] not in idle]
