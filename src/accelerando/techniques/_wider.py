"""Wider by doubling hidden units: what goes into a unit is copied, what comes out of it is shared out.

Which layers know a unit is asked of torch-pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023).  Each
share of an outgoing weight is drawn near evenly for each number, not alike for all: copies that were the same in
every way would learn the same for ever (Chen et al., "Net2Net", ICLR 2016, add noise for that, which is not exact).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, Signature, flatten
from accelerando.techniques._parity import batch, first_lines
from accelerando.techniques._quiet import quiet
from accelerando.techniques._shapes import FAILURES, close
from accelerando.workload import Samples

UNEVEN = 0.5  # how far a share may be from an even one
PASSIVE = ("ELEMENTWISE", "RESHAPE", "OUTPUT")


class Hidden(NamedTuple):
    """Hidden units that no sum, norm over them or attention ties to others.

    `root` gives them; `along` (batch norms, depthwise convolutions) handle each by itself; `into` take them, with the
    numbers of the inputs that each unit feeds, (units, inputs per unit).
    """

    root: Any
    along: tuple[Any, ...]
    into: tuple[tuple[Any, Array], ...]


def widen(module: Any, signature: Signature, data: Samples, times: float) -> str:
    """Make a module wider in place, and say how.

    Raises:
        RefusalError: it has no hidden units that are free to grow, or torch-pruning can't follow it.
    """
    import torch

    leaves = batch(signature, data.chunks[0].inputs, 2)
    args, kwargs = signature.call([torch.from_numpy(x) for x in leaves])

    def answer() -> list[Any]:
        with torch.no_grad():
            return flatten(module(*args, **kwargs))[0]

    wanted, rng, widths = answer(), np.random.default_rng(0), []
    for hidden in _hidden(module, leaves, signature):
        units, parts = _units(hidden.root), (hidden.root, *hidden.along, *(part for part, _ in hidden.into))
        turns = np.concatenate([rng.permutation(units) for _ in range(int(times))])
        drawn = turns[: max(1, round((times - 1) * units))]
        before = [(p, {**vars(p), "_parameters": {**p._parameters}, "_buffers": {**p._buffers}}) for p in parts]
        _grow(hidden, drawn, rng)
        if _same(wanted, answer):
            widths.append(units + len(drawn))
            continue
        for part, state in before:  # such as a softmax over the units, which the graph takes for elementwise
            vars(part).update(state)
    if not widths:
        raise RefusalError(
            Reason.UNSUPPORTED, "it has no hidden units that are free to grow: sums, norms or attention tie all of them"
        )
    return f"wider: {len(widths)} hidden widths times {times:g}, now {min(widths)} to {max(widths)}"


def _same(wanted: list[Any], answer: Callable[[], list[Any]]) -> bool:
    try:
        return all(close(want, have) for want, have in zip(wanted, answer(), strict=True))
    except FAILURES:
        return False


def _hidden(module: Any, leaves: list[Array], signature: Signature) -> list[Hidden]:
    import torch
    import torch_pruning

    args, kwargs = signature.call([torch.from_numpy(x) for x in leaves])
    flags = {p: p.requires_grad for p in module.parameters()}
    try:
        with quiet(), torch.enable_grad():
            module.requires_grad_(True)  # the graph is read from what autograd records
            graph = torch_pruning.DependencyGraph().build_dependency(
                module, leaves, forward_fn=lambda m, _: [x for x in flatten(m(*args, **kwargs))[0] if x.requires_grad]
            )
            groups = list(graph.get_all_groups(root_module_types=[torch.nn.Linear, *_convolutions()]))
    except Exception as error:
        raise RefusalError(Reason.UNSUPPORTED, f"torch-pruning can't follow it: {first_lines(error)}") from error
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return [h for h in (_free(group, graph) for group in groups) if h is not None]


def _free(group: Any, graph: Any) -> Hidden | None:
    """The hidden units of a group of coupled layers, if it is free to grow."""
    from torch_pruning.ops import OPTYPE

    root = group[0].dep.target.module
    along: list[Any] = []
    into: list[tuple[Any, Array]] = []
    units = _units(root)
    if OPTYPE(group[0].dep.target.type).name == "DEPTHWISE_CONV" or getattr(root, "groups", 1) > 1:
        return None
    for item in group[1:]:
        part, kind = item.dep.target.module, OPTYPE(item.dep.target.type).name
        gives = graph.is_out_channel_pruning_fn(item.dep.handler)
        if kind in PASSIVE:
            continue
        if kind == "BN" or (kind == "DEPTHWISE_CONV" and part.out_channels == part.in_channels):
            along += [part] if not any(part is known for known in along) else []
            if list(item.idxs) != list(range(units)):
                return None
        elif kind in ("LINEAR", "CONV") and not gives and getattr(part, "groups", 1) == 1:
            wide = part.in_features if kind == "LINEAR" else part.in_channels
            if sorted(item.idxs) != list(range(wide)) or wide % units:
                return None
            into.append((part, np.arange(wide).reshape(units, -1)))
        else:
            return None
    return Hidden(root, tuple(along), tuple(into)) if into else None


def _grow(hidden: Hidden, drawn: Array, rng: Any) -> None:
    """Add a copy of each drawn unit after all others."""
    import torch

    for part in (hidden.root, *hidden.along):
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor.ndim:
                units = _outputs_first(part, tensor.detach())
                _put(part, name, _outputs_first(part, torch.cat([units, units[torch.from_numpy(drawn)]])))
        _resize(part, len(drawn), gives=True)
    times = 1 + np.bincount(drawn, minlength=_units(hidden.root) - len(drawn))
    for part, inputs in hidden.into:
        weight = _outputs_first(part, part.weight.detach().clone())
        columns = torch.from_numpy(inputs[drawn].reshape(-1))
        even = np.repeat(1 / times[drawn], inputs.shape[1])
        shape = (len(weight), len(columns), *(1 for _ in weight.shape[2:]))
        shares = torch.from_numpy(even * (1 + rng.uniform(-UNEVEN, UNEVEN, shape[:2]))).reshape(shape).to(weight)
        moved = weight[:, columns] * shares
        weight.index_add_(1, columns, moved, alpha=-1)
        _put(part, "weight", _outputs_first(part, torch.cat([weight, moved], 1)))
        _resize(part, len(columns), gives=False)


def _outputs_first(part: Any, tensor: Any) -> Any:
    """A layer's tensor as (out, in, ...), or such a one as the layer keeps it.

    Transposed convolutions have their inputs first; where they are depthwise, channels come first in any case.
    """
    turned = getattr(part, "transposed", False) and part.groups == 1 and tensor.ndim > 1
    return tensor.transpose(0, 1).contiguous() if turned else tensor


def _put(part: Any, name: str, tensor: Any) -> None:
    import torch

    if name in part._buffers:
        part._buffers[name] = tensor
    else:
        part._parameters[name] = torch.nn.Parameter(tensor, requires_grad=part._parameters[name].requires_grad)


def _resize(part: Any, more: int, gives: bool) -> None:
    """Let a layer's own description say what its weights are."""
    if hasattr(part, "num_features"):
        part.num_features += more
    elif gives and getattr(part, "groups", 1) > 1:  # depthwise
        part.in_channels = part.out_channels = part.groups = part.groups + more
    else:
        what = "features" if hasattr(part, "in_features") else "channels"
        name = f"{'out' if gives else 'in'}_{what}"
        setattr(part, name, getattr(part, name) + more)


def _units(layer: Any) -> int:
    return int(layer.out_features if hasattr(layer, "out_features") else layer.out_channels)


def _convolutions() -> tuple[Any, ...]:
    import torch

    nn = torch.nn
    return nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
