"""Which channels of a network must go together: torch-pruning's dependency graph, as plain data.

DepGraph, Fang et al. 2023 (arXiv 2301.12900), follows channels through the operations of one run and takes any that
it does not know for elementwise.  So what it says is a proposal: `_prune_surgery.verified` proves each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerando.techniques._quiet import quiet


@dataclass(frozen=True)
class Cut:
    """How one layer loses channels of a group.

    Args:
        name: of the module or parameter.
        side: `out`, `in`, or `hidden` of a recurrent layer; norms and depthwise convolutions, through which channels
            pass, have `out` only.
        prune: torch-pruning's function, (layer, indices) -> layer.
        axis: of a parameter or layer norm.
        where: index in the layer, per channel that it holds.
        roots: the group's channel to which each of `where` belongs.
    """

    name: str
    side: str
    prune: Callable[[Any, list[int]], Any]
    axis: int | None
    where: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that run through coupled layers.

    Args:
        name: of the layer that makes them.
        units: channels that can only go together, such as those of one attention head: disjoint, of one size.
        cuts: what each layer loses.
        counts: attributes of modules that count units or channels: (module, attribute, what one unit counts for).
        heads: whether the units are attention heads.
        layers: how many layers of equal width the channels are those of; more than one in recurrent modules.
        others: the same group seen in other ways, if this one proves wrong.
    """

    name: str
    units: tuple[tuple[int, ...], ...]
    cuts: tuple[Cut, ...]
    counts: tuple[tuple[str, str, int], ...] = ()
    heads: bool = False
    layers: int = 1
    others: tuple[Group, ...] = ()

    @property
    def channels(self) -> int:
        return sum(map(len, self.units))


def find_groups(model: Any, leaves: Sequence[Any], call: Callable[[Any, Sequence[Any]], Sequence[Any]]) -> list[Group]:
    """Every group that does not reach an output, as the dependency graph sees it.

    Args:
        model: its parameters must want gradients, by which the graph is traced.
        leaves: flat inputs.
        call: (model, leaves) -> flat outputs.
    """
    import torch
    from torch import nn
    from torch_pruning import DependencyGraph

    def run(module: Any, inputs: Any) -> list[Any]:
        return [y for y in call(module, inputs) if y.grad_fn is not None]

    with quiet(), torch.enable_grad():
        graph = DependencyGraph()
        graph.build_dependency(model, leaves, forward_fn=run, verbose=False)
        names = {module: name for name, module in model.named_modules()}
        names.update({parameter: name for name, parameter in model.named_parameters()})
        groups, seen = [], set()
        for module in list(graph.module2node):
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module not in seen:
                cuts = _cuts(graph, module, names)
                makers = {c.name for c in cuts if c.side == "out"}
                seen |= {m for m, name in names.items() if name in makers}
                if cuts and _inner(cuts, model):
                    groups.append(_group(model, names[module], cuts))
    return groups


def _cuts(graph: Any, module: Any, names: dict[Any, str]) -> tuple[Cut, ...]:
    """The cuts of the group that a layer's outputs belong to; none where the graph can't follow or reaches the end."""
    from torch import nn
    from torch_pruning.ops import OPTYPE

    pruner = graph.get_pruner_of_module(module)
    try:
        items = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(pruner.get_out_channels(module))))
    except Exception:  # noqa: BLE001  whatever stops it, this layer keeps its width
        return ()
    cuts = []
    for item in items:
        target, handler = item.dep.target, item.dep.handler
        if target.type in (OPTYPE.OUTPUT, OPTYPE.MHA, OPTYPE.LSTM) or None in item.root_idxs:
            return ()
        if target.module in names:
            side = "in" if handler.__name__ == "prune_in_channels" else "out"
            axis = target.pruning_dim if isinstance(target.module, (nn.Parameter, nn.LayerNorm)) else None
            cuts.append(Cut(names[target.module], side, handler, axis, tuple(item.idxs), tuple(item.root_idxs)))
    return tuple(cuts)


def _inner(cuts: Sequence[Cut], model: Any) -> bool:
    """Whether a group has readers, and is not the stream of a transformer, of which every block reads every channel."""
    from torch import nn

    makers = [c for c in cuts if c.side == "out" and not _passes(model, c.name)]
    normed = any(isinstance(find(model, c.name), nn.LayerNorm) for c in cuts)
    return any(c.side == "in" for c in cuts) and not (normed and len(makers) > 1)


def _passes(model: Any, name: str) -> bool:
    """Whether channels pass through a layer one by one."""
    from torch import nn

    layer = find(model, name)
    made_here = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.Parameter)
    depthwise = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels > 1
    return depthwise or not isinstance(layer, made_here)


def find(model: Any, name: str) -> Any:
    """The module or parameter of a name."""
    from functools import reduce

    return reduce(getattr, name.split("."), model) if name else model


def _group(model: Any, name: str, cuts: tuple[Cut, ...]) -> Group:
    """The group, seen in the likeliest way first."""
    from torch import nn

    width = max(c for cut in cuts for c in cut.roots) + 1
    pieces = 1  # of which each loses equally many channels
    for layer in (find(model, c.name) for c in cuts):
        grouped = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups < layer.out_channels
        pieces = max(pieces, layer.groups if grouped else 1, layer.num_groups if isinstance(layer, nn.GroupNorm) else 1)
    if width % pieces:
        pieces = 1
    step = width // pieces
    plain = Group(name, tuple(tuple(range(i, width, step)) for i in range(step)), cuts)
    ways = [*_by_heads(model, plain, width), plain]
    return Group(**{**vars(ways[0]), "others": tuple(ways[1:])})


def _by_heads(model: Any, plain: Group, width: int) -> Iterator[Group]:
    """The group with whole attention heads as units, where the module that owns its layer counts heads."""
    owner_name = plain.name.rpartition(".")[0]
    owner = find(model, owner_name)
    whole = {k: v for k, v in vars(owner).items() if isinstance(v, int) and not isinstance(v, bool)}
    counts = {k: v for k, v in whole.items() if "head" in k and "dim" not in k and "size" not in k and v > 1}
    for heads in sorted(set(counts.values())):
        for thirds in (1, 3):  # three where queries, keys and values are made by one layer
            size, rest = divmod(width, heads * thirds)
            if rest or not size:
                continue
            part = width // thirds
            units = tuple(
                tuple(t * part + h * size + i for t in range(thirds) for i in range(size)) for h in range(heads)
            )
            cuts = tuple(_folded(c, part, model) for c in plain.cuts) if thirds == 3 else plain.cuts
            few = [(owner_name, k, 1) for k, v in counts.items() if v == heads]
            wide = [(owner_name, k, size) for k, v in whole.items() if v == size * heads]
            sure = [c for c in wide if "head" in c[1]]
            yield Group(owner_name or plain.name, units, cuts, (*few, *sure), True)
            if wide != sure:
                yield Group(owner_name or plain.name, units, cuts, (*few, *wide), True)


def _folded(cut: Cut, part: int, model: Any) -> Cut:
    """Where a reader is a third as wide as what the graph thinks it reads, its indices start anew."""
    from torch import nn

    layer = find(model, cut.name)
    if cut.side == "in" and isinstance(layer, nn.Linear) and layer.in_features == part and max(cut.where) >= part:
        pairs = {w % part: r for w, r in reversed(list(zip(cut.where, cut.roots, strict=True)))}
        return Cut(cut.name, cut.side, cut.prune, cut.axis, tuple(pairs), tuple(pairs.values()))
    return cut
