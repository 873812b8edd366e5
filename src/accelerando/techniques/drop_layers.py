"""Fewer layers: residual blocks are left out, those first without which the model's answers change least."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import CONSTANTS, Array
from accelerando.techniques._blocks import Call, blocks, first_of, observe, repeated
from accelerando.techniques._parity import answer_torch, batch, ensure_same, example, first_lines, probes
from accelerando.workload import Form, Model, Samples, flat_module

RANKS = ("greedy", "last")
LEAST_ROWS, MOST_ROWS = 16, 128  # to rank with
WORK = 1e12  # floating-point operations for a ranking: some 15 s of one core
GROUP = 4  # of so many blocks that are left, one goes before the others are measured again
FAULTS = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, NotImplementedError)

_orders: WeakKeyDictionary[Any, tuple[Samples, list[str]]] = WeakKeyDictionary()  # by module: share does not matter


@dataclass(frozen=True)
class DropLayers(Technique):
    """Leave residual blocks out: what went into one goes on to the next.

    Ranked greedily, as in ShortGPT-like pruning but by the model's own answers (Men et al., arXiv 2403.03853; Song et
    al., SLEB, arXiv 2402.09025): the block is left out without which the answers change least, and the others are
    measured again.  Where more than seven are left, a quarter goes at a time.

    Args:
        share: of the blocks that can be left out, rounded to whole blocks; at least one goes, and one stays.
        rank: `greedy`, or `last`: the last blocks first, which takes no time and is often as good once healed.
    """

    share: float = 0.5
    rank: str = "greedy"

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    typical_seconds: ClassVar[float] = 15.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, both excluded, but is {self.share!r}")
        if self.rank not in RANKS:
            raise ValueError(f"rank must be one of {', '.join(RANKS)}, but is {self.rank!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[DropLayers]:
        return [cls(), cls(rank="last")]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is not Form.TORCH or len(repeated(model.content)) > 1:
            return None
        return RefusalError(Reason.NOTHING_TO_DO, "it holds no two layers of one class that follow each other")

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        names = [name for name, _ in blocks(model.content, model.signature, example(model.signature, data))]
        if len(names) < 2:
            raise RefusalError(
                Reason.NOTHING_TO_DO,
                f"{', '.join(names) or 'no layer'} is a residual block that keeps its input's shape; "
                "two are needed, so that one is left",
            )
        count = min(len(names) - 1, max(1, int(self.share * len(names) + 0.5)))
        order = names[::-1] if self.rank == "last" else _greedy(model, data, names)
        gone = [name for name in names if name in order[:count]]
        log = f"drop_layers: {count} of {len(names)} residual blocks left out: {', '.join(gone)}"
        return model.changed(Form.TORCH, _without(model, data, gone), log)


# --- which -------------------------------------------------------------------------------------------------------


def _greedy(model: Model, data: Samples, names: list[str]) -> list[str]:
    """All blocks, the most dispensable first; the same for every share, so a greater one only takes away more."""
    known = _orders.get(model.content)
    if known is not None and known[0] is data:
        return known[1]
    trial = _Trial.of(model, data, names)
    batches = _batches(model, data, passes=GROUP * len(names))
    expected, classes = [trial.answers([], leaves) for leaves, _ in batches], [targets for _, targets in batches]
    gone, left = list[str](), list(names)
    while len(left) > 1:
        gaps = {}
        for name in left:
            got = [trial.answers([*gone, name], leaves) for leaves, _ in batches]
            gaps[name] = sum(map(_distance, expected, got, classes))
        taken = sorted(left, key=lambda name: (gaps[name], -names.index(name)))[: max(1, len(left) // GROUP)]
        gone, left = [*gone, *taken], [name for name in left if name not in taken]
    _orders[model.content] = data, [*gone, *left]
    return [*gone, *left]


def _batches(model: Model, data: Samples, passes: int) -> list[tuple[list[Array], Array | None]]:
    """Inputs and targets to rank with: as many rows as `passes` over them are worth the time."""
    from torch.utils.flop_counter import FlopCounterMode

    leaves = example(model.signature, data)
    with FlopCounterMode(display=False) as counter:
        answer_torch(flat_module(model), leaves)
    each = max(1.0, counter.get_total_flops() / len(leaves[0]))
    rows = data.take(int(np.clip(WORK / (passes * each), LEAST_ROWS, MOST_ROWS)))
    return [(batch(model.signature, c.inputs, len(c)), c.targets) for c in rows.batches(MOST_ROWS)]


def _distance(expected: Sequence[Array], got: Sequence[Array], targets: Array | None) -> float:
    """How far answers are from the expected ones, weighed by their number of rows; infinite where they are not finite.

    Kullback-Leibler divergence of class probabilities, squared error relative to the answer's own square for other
    floats, share of the entries that differ for whole numbers.
    """
    total = 0.0
    for want, have in zip(expected, got, strict=True):
        if want.dtype.kind != "f":
            total += float(np.mean(want != have))
        elif want.ndim == 2 and targets is not None and targets.ndim == 1 and targets.dtype.kind in "iu":
            p, q = _log_softmax(want), _log_softmax(have)
            total += float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))
        else:
            wide = want.astype(np.float64)
            total += float(np.sum((have - wide) ** 2) / max(np.sum(wide**2), 1e-30))
    return total * len(expected[0]) if np.isfinite(total) else np.inf


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class _Trial:
    """A copy of the model whose blocks can be passed over for one call."""

    flat: Any
    stand_ins: dict[str, tuple[Any, Any]]  # by name: the block, and what stands in for it

    @classmethod
    def of(cls, model: Model, data: Samples, names: Sequence[str]) -> _Trial:
        copied = model.changed(Form.TORCH, copy.deepcopy(model.content))
        calls = observe(copied.content, names, model.signature, example(model.signature, data))
        parts = {name: copied.content.get_submodule(name) for name in names}
        return cls(flat_module(copied), {n: (part, _stand_in(part, calls[n])) for n, part in parts.items()})

    def answers(self, gone: Iterable[str], leaves: Sequence[Array]) -> list[Array]:
        """The flat answer with these blocks passed over."""
        with self._passing(gone):
            return answer_torch(self.flat, leaves)

    @contextmanager
    def _passing(self, gone: Iterable[str]) -> Iterator[None]:
        pairs = [self.stand_ins[name] for name in gone]
        for block, stand_in in pairs:
            block.forward = stand_in.forward  # all else stays, for owners read attributes of their layers
        try:
            yield
        finally:
            for block, _ in pairs:
                del block.forward


# --- taking them out ---------------------------------------------------------------------------------------------


def _without(model: Model, data: Samples, gone: Sequence[str]) -> Any:
    """A copy of the module without these blocks: out of their containers where that is the same, else stood in for.

    A container that is iterated over gets shorter; one whose items are counted, or paired with others, can't.

    Raises:
        RefusalError: it does not run without them.
    """
    trial = _Trial.of(model, data, gone)
    expected = [(leaves, trial.answers(gone, leaves)) for leaves in probes(model.signature, data)]
    cut = model.changed(Form.TORCH, copy.deepcopy(model.content))
    parents: dict[str, list[str]] = {}
    for name in gone:
        parent, _, key = name.rpartition(".")
        parents.setdefault(parent, []).append(key)
        cut.content.get_submodule(parent)._modules[key] = trial.stand_ins[name][1]
    for name in sorted(parents, key=lambda name: -name.count(".")):  # the inner first: the outer renumber them
        _shorten(cut, name, parents[name], expected)
    try:
        _ensure(cut, expected)
    except FAULTS as error:
        raise RefusalError(Reason.UNSUPPORTED, f"it does not run without {gone[0]}: {first_lines(error)}") from error
    return cut.content


def _shorten(cut: Model, name: str, keys: Sequence[str], expected: Sequence[tuple[list[Array], list[Array]]]) -> None:
    """Take parts out of a container, and put them back where the answers are then others."""
    import torch

    container = cut.content.get_submodule(name)
    if not isinstance(container, (torch.nn.Sequential, torch.nn.ModuleList)):
        return
    before = container._modules
    kept = {key: part for key, part in before.items() if key not in keys}
    numbered = all(key.isdigit() for key in before)
    container._modules = {str(i) if numbered else key: part for i, (key, part) in enumerate(kept.items())}
    try:
        _ensure(cut, expected)
    except (RefusalError, *FAULTS):
        container._modules = before


def _ensure(cut: Model, expected: Sequence[tuple[list[Array], list[Array]]]) -> None:
    flat = flat_module(cut)
    for leaves, answers in expected:
        ensure_same(cut.signature, answers, answer_torch(flat, leaves))


def _stand_in(block: Any, call: Call) -> Any:
    """A module without weights that answers with its first input, in the structure in which the block answered."""
    import torch

    class Pass(torch.nn.Module):
        def __init__(self, rest: tuple[Any, ...] | None) -> None:
            super().__init__()
            self.rest = rest

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            first = first_of(args, kwargs)
            return first if self.rest is None else (first, *self.rest)

    made = Pass(call.answer[1:] if isinstance(call.answer, tuple) else None).train(block.training)
    for key, value in vars(block).items():  # such as `attention_type`, which an owner reads of every layer
        if not key.startswith("_") and isinstance(value, CONSTANTS) and not hasattr(made, key):
            setattr(made, key, value)
    return made
