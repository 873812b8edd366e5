"""Taking channels away, and the proof that it was done rightly.

A channel that nobody reads does not matter.  So a network without a channel must answer exactly as the network in
which every reader of that channel has zero weights for it: that tells a right group of coupled layers from a wrong
one, whatever operations lie between.  Norms over channels are left out of both while comparing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerando.techniques import _prune_recurrent
from accelerando.techniques._prune_groups import Cut, Group, find
from accelerando.techniques._quiet import quiet

Picked = Mapping[int, Sequence[int]]  # units to take away, by number of the group
Answer = Callable[[Any], Sequence[Any]]  # a module's flat outputs for a probe
TOLERANCE = 1e-3  # of the largest answer, as everywhere


def operate(model: Any, groups: Sequence[Group], picked: Picked) -> Any:
    """A copy of the model without these units."""
    import torch

    made = copy.deepcopy(model)
    with quiet(), torch.no_grad():
        for (name, _), (cut, where) in _merged(groups, picked).items():
            layer = find(made, name)
            if isinstance(layer, torch.nn.Identity):
                continue  # a norm that is left out of the comparison
            if cut.axis is not None:
                cut.prune.__self__.pruning_dim = cut.axis  # type: ignore[attr-defined]
            changed = cut.prune(layer, sorted(where))
            if isinstance(layer, torch.nn.Parameter):
                parent, _, leaf = name.rpartition(".")
                setattr(find(made, parent), leaf, changed)
        for number, units in picked.items():
            for name, attribute, each in groups[number].counts:
                owner = find(made, name)
                setattr(owner, attribute, getattr(owner, attribute) - each * len(units))
    return made


def silence(model: Any, groups: Sequence[Group], picked: Picked) -> Any:
    """A copy of the model in which nobody reads these units."""
    import torch

    made = copy.deepcopy(model)
    with torch.no_grad():
        for (name, side), (_, where) in _merged(groups, picked).items():
            layer = find(made, name)
            if isinstance(layer, torch.nn.RNNBase):
                _prune_recurrent.ignore(layer, side, sorted(where))
            elif side == "in":
                _ignore_inputs(layer, sorted(where))
    return made


def _merged(groups: Sequence[Group], picked: Picked) -> dict[tuple[str, str], tuple[Cut, set[int]]]:
    """What each layer loses on each side; a layer may read several groups, whose indices must go at once."""
    found: dict[tuple[str, str], tuple[Cut, set[int]]] = {}
    for number, units in picked.items():
        roots = {root for unit in units for root in groups[number].units[unit]}
        for cut in groups[number].cuts:
            gone = {w for w, root in zip(cut.where, cut.roots, strict=True) if root in roots}
            found.setdefault((cut.name, cut.side), (cut, set()))[1].update(gone)
    return found


def _ignore_inputs(layer: Any, where: list[int]) -> None:
    """Zero a layer's weights for some of its inputs."""
    from torch import nn

    if isinstance(layer, nn.Linear):
        layer.weight[:, where] = 0
    elif layer.transposed:
        layer.weight[where] = 0
    else:  # (out, in / groups, ...), the groups one after the other
        rows, columns = layer.out_channels // layer.groups, layer.in_channels // layer.groups
        for i in where:
            layer.weight[i // columns * rows : (i // columns + 1) * rows, i % columns] = 0


def verified(model: Any, groups: Sequence[Group], answer: Answer) -> list[Group]:
    """The groups that prove right, each seen in the first way that does.

    Halves what fails, so that a few wrong groups among many cost few runs.
    """
    if not groups or all_right(model, groups, {i: _sample(g) for i, g in enumerate(groups)}, answer):
        return list(groups)
    if len(groups) > 1:
        half = len(groups) // 2
        return verified(model, groups[:half], answer) + verified(model, groups[half:], answer)
    first, *rest = groups[0].others or (None,)
    if first is None:
        return []
    return verified(model, [Group(**{**vars(first), "others": tuple(rest)})], answer)


def _sample(group: Group) -> Sequence[int]:
    """Units to try a group with: neither the first nor all alike, and one stays."""
    count = len(group.units)
    return sorted({count // 2, (2 * count) // 3}) if count > 2 else range(count - 1)


def all_right(model: Any, groups: Sequence[Group], picked: Picked, answer: Answer) -> bool:
    """Whether the network without these units answers as the one in which nobody reads them."""
    import torch

    if not any(picked.values()):
        return False
    bare = without_norms(model, groups)
    try:
        expected = answer(silence(bare, groups, picked))
        got = answer(operate(bare, groups, picked))
    except Exception:  # noqa: BLE001  it does not run, or has no such channel: the group is wrong
        return False
    for want, have in zip(expected, got, strict=True):
        if want.shape != have.shape or want.dtype != have.dtype:
            return False
        if want.dtype.is_floating_point:
            scale = want.abs().amax().clamp(min=1e-6) if want.numel() else 1.0
            if not bool(((want - have).abs() <= TOLERANCE * scale).all()):
                return False
        elif not torch.equal(want, have):
            return False
    return True


def without_norms(model: Any, groups: Sequence[Group]) -> Any:
    """The model, or a copy in which norms over the channels of a group do nothing, to compare both sides in."""
    from torch import nn

    names = {c.name for g in groups for c in g.cuts}
    norms = [name for name in names if isinstance(find(model, name), (nn.LayerNorm, nn.GroupNorm))]
    made = copy.deepcopy(model) if norms else model
    for name in norms:
        owner, _, leaf = name.rpartition(".")
        setattr(find(made, owner), leaf, nn.Identity())
    return made
