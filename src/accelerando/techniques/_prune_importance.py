"""How much each unit of a group matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerando.signature import flatten
from accelerando.techniques import _prune_recurrent
from accelerando.techniques._prune_groups import Cut, Group, find
from accelerando.workload import Model, Samples, filled

ROWS_AT_ONCE = 16  # the gradient of few rows: those of many would cancel out
MOST_ROWS = 256


def magnitudes(model: Any, groups: Sequence[Group]) -> list[list[float]]:
    """Per group and unit: the mean squared norm of its weights in all coupled layers, where 1 is the group's mean.

    The group L2 norm of Fang et al. 2023 (DepGraph, arXiv 2301.12900); dividing by the mean makes layers comparable.
    """
    import torch

    found = []
    for group in groups:
        total = torch.zeros(group.channels)
        for cut in group.cuts:
            layer = find(model, cut.name)
            for name, by_channel in _parts(layer, cut.side, reading=False):
                total += _gather(by_channel(getattr(layer, name).detach() ** 2), cut, group.channels)
        units = torch.stack([total[list(unit)].mean() for unit in group.units])
        found.append((units / units.mean().clamp(min=1e-12)).tolist())
    return found


def taylor(model: Model, module: Any, groups: Sequence[Group], data: Samples) -> list[list[float]]:
    """Per group and unit: the squared first-order change of the loss if it were taken away, per channel.

    Molchanov et al. 2019 (arXiv 1906.10771), equation 8, with a gate on each unit: the gate's gradient is that of
    its readers' weights, times those weights.  Of classes the loss is the cross-entropy with the targets; of any
    other answers it is the squared distance from the original's own, whose first-order change needs no targets: the
    mean over random signs of (signs . change of the answers) squared.

    Args:
        module: the original's function, the groups found in it; its parameters must want gradients.
    """
    import torch

    rng = torch.Generator().manual_seed(0)
    totals = [torch.zeros(len(group.units)) for group in groups]
    weights = {
        (c.name, name): getattr(layer, name)
        for c, layer in ((c, find(module, c.name)) for g in groups for c in g.cuts)
        for name, _ in _parts(layer, c.side, reading=True)
    }
    for chunk in data.take(MOST_ROWS).batches(model.signature.fixed_batch or ROWS_AT_ONCE):
        leaves = filled(chunk.inputs, model.signature.fixed_batch)
        args, kwargs = model.signature.call([torch.from_numpy(x.copy()) for x in leaves])
        with torch.enable_grad():
            outputs = flatten(module(*args, **kwargs))[0]
            slopes = torch.autograd.grad(_loss(outputs, chunk.targets, rng), list(weights.values()), allow_unused=True)
        slope_of = dict(zip(weights, slopes, strict=True))
        for total, group in zip(totals, groups, strict=True):
            total += _gates(module, group, slope_of) ** 2 / len(group.units[0])
    return [total.tolist() for total in totals]


def _gates(module: Any, group: Group, slope_of: dict[tuple[str, str], Any]) -> Any:
    """The loss's slope along each unit's gate."""
    import torch

    gates = torch.zeros(group.channels)
    for cut in group.cuts:
        layer = find(module, cut.name)
        for name, by_channel in _parts(layer, cut.side, reading=True):
            slope = slope_of[cut.name, name]
            if slope is not None:
                gates += _gather(by_channel(getattr(layer, name).detach() * slope), cut, group.channels)
    return torch.stack([gates[list(unit)].sum() for unit in group.units])


def _loss(outputs: Sequence[Any], targets: Any, rng: Any) -> Any:
    import torch

    first = outputs[0]
    if targets is not None and targets.dtype.kind in "iu" and first.dim() == 2 and targets.shape == (len(first),):
        answers = torch.from_numpy(targets).long()
        if first.shape[1] > int(answers.max()) and int(answers.min()) >= 0:
            return torch.nn.functional.cross_entropy(first, answers)
    change = first.new_zeros(())
    for y in outputs:
        if y.dtype.is_floating_point and y.requires_grad:
            signs = torch.randint(0, 2, y.shape, generator=rng).to(y) * 2 - 1
            change = change + (y * signs).sum()
    return change


def _parts(layer: Any, side: str, reading: bool) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """A layer's weights that belong to a side's channels, and how values of their shape are summed by channel."""
    from torch import nn

    if isinstance(layer, nn.RNNBase):
        yield from _prune_recurrent.parts(layer, side, reading)
    elif isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and (side == "in" or not reading):
        yield "weight", lambda values: per_channel(layer, values, side)


def per_channel(layer: Any, values: Any, side: str) -> Any:
    """The sum of weight-shaped values over all but the channels of one side of a linear or convolutional layer."""
    from torch import nn

    if isinstance(layer, nn.Linear):
        return values.sum(1 if side == "out" else 0)
    outer, inner, groups = values.shape[0], values.shape[1], layer.groups
    if (side == "out") == (not layer.transposed):  # the side that the first axis holds in full
        return values.reshape(outer, -1).sum(1)
    return values.reshape(groups, outer // groups, inner, -1).sum((1, 3)).flatten()


def _gather(values: Any, cut: Cut, channels: int) -> Any:
    """What a layer's channels say, summed by the group's channels."""
    import torch

    picked = values[torch.tensor(cut.where)]
    return torch.zeros(channels, dtype=picked.dtype).index_add(0, torch.tensor(cut.roots), picked).float()
