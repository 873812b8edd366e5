"""Structured pruning: fewer channels, attention heads and hidden widths, with everything that depends on them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Array, flatten
from accelerando.techniques._parity import answer_torch, example, first_lines, probes
from accelerando.techniques._prune_attention import free_heads
from accelerando.techniques._prune_groups import Group, find_groups
from accelerando.techniques._prune_importance import magnitudes, taylor
from accelerando.techniques._prune_ranking import pick
from accelerando.techniques._prune_recurrent import find_recurrent
from accelerando.techniques._prune_surgery import all_right, operate, verified
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples, flat_module

IMPORTANCES = ("magnitude", "taylor")
NAMED = 10  # layers that the log names

_known: WeakKeyDictionary[Any, tuple[list[Group], list[str]]] = WeakKeyDictionary()  # by module: `_groups` of it


@dataclass(frozen=True)
class PruneChannels(Technique):
    """Takes away the channels, heads and hidden units that matter least, in all layers that they run through.

    The layers that depend on each other are found by torch-pruning (DepGraph, Fang et al. 2023), and each group of
    them is proven on the model itself before it is cut.  Outputs keep their shapes; the stream that runs through a
    transformer keeps its width.

    Args:
        share: of all channels that can be cut, how many are taken away; a few of each layer always stay.
        importance: `magnitude` (of the weights) or `taylor` (what the loss on calibration rows would change by).
        everywhere: rank the channels of all layers together; if not, each layer loses the same share.
    """

    share: float = 0.5
    importance: str = "taylor"
    everywhere: bool = True

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    needs: ClassVar[tuple[str, ...]] = ("torch", "torch_pruning")

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, both excluded, but is {self.share}")
        if self.importance not in IMPORTANCES:
            raise ValueError(f"importance must be one of {', '.join(IMPORTANCES)}, but is {self.importance!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[PruneChannels]:
        return [cls(), cls(importance="magnitude"), cls(everywhere=False)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if model.form is not Form.TORCH:
            return None
        from torch import nn

        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)
        if not any(isinstance(m, kinds) for m in model.content.modules()):
            return RefusalError(
                Reason.NOTHING_TO_DO, "it holds no linear, convolutional, attention or recurrent layer of torch's own"
            )
        return None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        leaves = example(model.signature, data)
        base = free_heads(copy.deepcopy(model.content)).requires_grad_(True)
        if model.content not in _known:  # a search asks for many shares of one structure
            _ensure_static(model, leaves)
            _known[model.content] = _groups(model, base, leaves)
        groups, whole = _known[model.content]
        if self.importance == "taylor":
            with quiet():
                scores = taylor(model, base, groups, data)
        else:
            scores = magnitudes(base, groups)
        picked = pick(groups, scores, self.share, self.everywhere)
        if not picked:
            raise RefusalError(Reason.NOTHING_TO_DO, f"its {len(groups)} layers that can be cut are too narrow already")
        if not all_right(base, groups, picked, lambda module: _answer(model, module, leaves)):
            raise RefusalError(Reason.WRONG_OUTPUT, "cut in all layers at once, it does not answer as it should")
        made = _like_before(operate(base, groups, picked), model.content)
        result = model.changed(Form.TORCH, made, *_log(groups, picked, whole, model.content, made))
        _ensure_shapes(model, result, data)
        return result


def _answer(model: Model, module: Any, leaves: Sequence[Array]) -> list[Any]:
    """A module's flat outputs."""
    import torch

    args, kwargs = model.signature.call([torch.from_numpy(x.copy()) for x in leaves])
    with torch.no_grad():
        return flatten(module(*args, **kwargs))[0]


def _ensure_static(model: Model, leaves: Sequence[Array]) -> None:
    """Refuse a model whose way depends on values: a graph of one run says nothing about the next.

    Fake tensors have shapes, but no values: whatever asks for one fails.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = copy.deepcopy(model.content)  # it may remember what it saw
    try:
        with quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(torch.from_numpy(x.copy())) for x in leaves]
            args, kwargs = model.signature.call(fakes)
            module(*args, **kwargs)
    except Exception as error:
        name = type(model.content).__name__
        raise RefusalError(
            Reason.UNSUPPORTED, f"{name} can't be followed without values: {first_lines(error)}"
        ) from error


def _groups(model: Model, base: Any, leaves: Sequence[Array]) -> tuple[list[Group], list[str]]:
    """The groups that were proven to be right and can lose something, and the layers of those that were not."""
    import torch

    def call(module: Any, tensors: Sequence[Any]) -> Sequence[Any]:
        args, kwargs = model.signature.call(tensors)
        return flatten(module(*args, **kwargs))[0]

    def answer(module: Any) -> list[Any]:
        return _answer(model, module, leaves)

    name, why = type(model.content).__name__, "every layer's width shows in an output"
    found = find_recurrent(base, answer)
    try:
        found += find_groups(base, [torch.from_numpy(x.copy()) for x in leaves], call)
    except Exception as error:
        why = f"torch-pruning can't trace it: {first_lines(error)}"
        if not found:
            raise RefusalError(Reason.UNSUPPORTED, f"no layer of {name} can be cut: {why}") from error
    order = {name: i for i, (name, _) in enumerate(base.named_modules())}
    found = sorted((g for g in found if len(g.units) > 1 or g.others), key=lambda g: order.get(g.name, 0))
    groups = verified(base, found, answer)
    right = {g.cuts[0].name for g in groups}  # the same in whichever way a group was seen
    wrong = [g.cuts[0].name for g in found if g.cuts[0].name not in right]
    if groups:
        return groups, wrong
    if wrong:
        why = f"{len(wrong)} groups of coupled layers were tried, but none proved to be right: {_named(wrong)}"
    raise RefusalError(Reason.UNSUPPORTED, f"no layer of {name} can be cut: {why}")


def _like_before(made: Any, original: Any) -> Any:
    """The same parameters want gradients as before, and none holds one."""
    wanted = {name: p.requires_grad for name, p in original.named_parameters()}
    some = any(wanted.values())
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(wanted.get(name, some))
        parameter.grad = None
    return made


def _ensure_shapes(model: Model, result: Model, data: Samples) -> None:
    """Refuse answers of other shapes or types than the original's, at any size."""
    before, after = flat_module(model), flat_module(result)
    for leaves in probes(model.signature, data):
        try:
            got = answer_torch(after, leaves)
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"cut, it does not run: {first_lines(error)}") from error
        for port, want, have in zip(model.signature.outputs, answer_torch(before, leaves), got, strict=True):
            if want.shape != have.shape or want.dtype != have.dtype:
                raise RefusalError(
                    Reason.WRONG_OUTPUT, f"{port.name} is {have.dtype}{have.shape}, but was {want.dtype}{want.shape}"
                )


def _log(
    groups: Sequence[Group], picked: dict[int, list[int]], whole: Sequence[str], before: Any, after: Any
) -> list[str]:
    """Such as `prune_channels: took away 8 of 16 channels in a and 22 more layers (0.85 M -> 0.31 M parameters)`.

    Args:
        whole: layers that keep their channels, for their groups did not prove right.
    """
    parts = []
    for number, units in list(picked.items())[:NAMED]:
        group = groups[number]
        size = 1 if group.heads else len(group.units[0])
        kind = "heads" if group.heads else "channels"
        parts.append(f"{len(units) * size} of {len(group.units) * size} {kind} in {group.name}")
    more = f" and {len(picked) - NAMED} more layers" if len(picked) > NAMED else ""
    small, large = (f"{_count(m) / 1e6:.3g} M" for m in (after, before))
    lines = [f"prune_channels: took away {', '.join(parts)}{more} ({large} -> {small} parameters)"]
    if whole:
        lines.append(f"prune_channels: left whole, for which layers depend on them can't be told: {_named(whole)}")
    return lines


def _named(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - NAMED} more" if len(layers) > NAMED else ""
    return f"{', '.join(layers[:NAMED])}{more}"


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())
