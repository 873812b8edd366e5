"""Deeper by parts that change nothing yet: copies of residual blocks, or identity layers.

A copy's last layers are zero, so that it passes on what it is given; which layers those are is found by trying.
Where a model has no residual blocks, an identity layer goes after a ReLU (Chen et al., "Net2Net", ICLR 2016).
"""

from __future__ import annotations

import copy
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, Signature
from accelerando.techniques._blocks import Call, blocks, observe
from accelerando.techniques._parity import batch
from accelerando.techniques._shapes import FAILURES, with_first
from accelerando.workload import Samples

PROBE_ROWS = 2
SAME = 1e-5  # of the largest number: a norm of what is normalised already is the same but for its epsilon


def deepen(module: Any, signature: Signature, data: Samples, times: float) -> str:
    """Make a module deeper in place, and say how.

    Raises:
        RefusalError: it has neither residual blocks that can be copied nor a Sequential with ReLUs.
    """
    leaves = batch(signature, data.chunks[0].inputs, PROBE_ROWS)
    named = blocks(module, signature, leaves)
    calls = observe(module, [name for name, _ in named], signature, leaves)
    copies = {n: _neutral(module.get_submodule(n), calls[n]) for n, _ in named if _in_chain(module, n)}
    able = {n: c for n, c in copies.items() if c is not None}
    if able:
        return _copied(module, able, signature, leaves, times)
    if said := _identities(module, signature, leaves, times):
        return said
    why = f"{next(iter(copies))} does not pass its input on, whatever of it is zero" if copies else "it has no blocks"
    raise RefusalError(Reason.UNSUPPORTED, f"{why}, nor a Sequential with ReLUs to put identity layers after")


def _copied(module: Any, able: dict[str, Any], signature: Signature, leaves: list[Array], times: float) -> str:
    chains: dict[str, list[str]] = {}
    for name in able:
        chains.setdefault(name.rpartition(".")[0], []).append(name)
    extra = {chain: round((times - 1) * len(names)) for chain, names in chains.items()}
    if not any(extra.values()):
        extra[max(chains, key=lambda chain: len(chains[chain]))] = 1
    added: list[Any] = []
    for chain, names in chains.items():
        parent, count = module.get_submodule(chain), extra[chain]
        for name in reversed(names):  # from the end, so that what comes before keeps its number
            at = int(name.rpartition(".")[2]) + 1
            for _ in range(_share(names.index(name), len(names), count)):
                added.append(copy.deepcopy(able[name]))
                parent.insert(at, added[-1])
    where = [name for name, part in module.named_modules() if any(part is one for one in added)]
    if len(observe(module, where, signature, leaves)) < len(where):
        raise RefusalError(Reason.UNSUPPORTED, f"its code does not run all of {', '.join(chains)} in turn")
    return "deeper: " + ", ".join(
        f"{chain} by {count} of {len(chains[chain])} blocks" for chain, count in extra.items() if count
    )


def _share(index: int, places: int, count: int) -> int:
    """How many of `count` copies go after the place with this index, spread evenly."""
    return (index + 1) * count // places - index * count // places


def _in_chain(module: Any, name: str) -> bool:
    import torch

    parent, _, key = name.rpartition(".")
    return isinstance(module.get_submodule(parent), (torch.nn.ModuleList, torch.nn.Sequential)) and key.isdigit()


def _neutral(block: Any, call: Call) -> Any | None:
    """A copy of a block that passes on what the block answers, with as few of its layers at zero as it takes.

    Layers come back from the front, so that those that stay at zero are the last ones, and the rest can teach them.
    """
    import torch

    made = copy.deepcopy(block)
    layers = [m for m in made.modules() if any(True for _ in m.parameters(recurse=False))]
    kept = [{k: p.detach().clone() for k, p in m.named_parameters(recurse=False)} for m in layers]
    with torch.no_grad():
        for layer in layers:
            _fill(layer, None)
        if not _passes(made, call):
            return None
        for layer, values in zip(layers, kept, strict=True):
            _fill(layer, values)
            if not _passes(made, call):
                _fill(layer, None)
    return made


def _fill(layer: Any, values: dict[str, Any] | None) -> None:
    for name, parameter in layer.named_parameters(recurse=False):
        if values is None:
            parameter.zero_()
        else:
            parameter.copy_(values[name])


def _passes(block: Any, call: Call) -> bool:
    """Whether a block answers with what it is given, when that is what the block before it answered."""
    given = call.answer[0] if isinstance(call.answer, tuple) else call.answer
    args, kwargs = with_first(call.args, call.kwargs, given)
    answer = block(*args, **kwargs)
    answer = answer[0] if isinstance(answer, tuple) else answer
    return bool((answer - given).abs().max() <= SAME * given.abs().max())


def _identities(module: Any, signature: Signature, leaves: list[Array], times: float) -> str:
    """Put identity layers after ReLUs in Sequentials; the empty text where there are none."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    places = []
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Sequential):
            before = None
            for i, child in enumerate(part):
                before = child if isinstance(child, kinds) else before
                if type(child) is torch.nn.ReLU and before is not None:
                    places.append((f"{name}.{i}".lstrip("."), part, i, before))
    calls = observe(module, [where for where, *_ in places], signature, leaves)
    places = [(where, part, i, _identity(before)) for where, part, i, before in places if where in calls]
    places = [place for place in places if _fits(place[3], calls[place[0]])]
    count = max(1, round((times - 1) * len(places)))
    for index in reversed(range(len(places))):
        _, part, i, layer = places[index]
        for _ in range(_share(index, len(places), count)):
            part.insert(i + 1, copy.deepcopy(layer))
            part.insert(i + 2, torch.nn.ReLU())
    return f"deeper by {count} identity layers" if places else ""


def _fits(layer: Any, call: Call) -> bool:
    """Whether a layer passes on what a ReLU answers; not so where channels were moved between."""
    import torch

    try:
        with torch.no_grad():
            return _passes(layer, call)
    except FAILURES:
        return False


def _identity(like: Any) -> Any:
    """A linear layer, or a plain convolution, that passes on what a layer like this gives."""
    import torch

    convolutions = {3: torch.nn.Conv1d, 4: torch.nn.Conv2d, 5: torch.nn.Conv3d}  # by the axes of their weights
    with torch.no_grad():
        if isinstance(like, torch.nn.Linear):
            layer: Any = torch.nn.Linear(like.out_features, like.out_features)
            layer.weight.copy_(torch.eye(like.out_features))
        else:
            layer = convolutions[like.weight.ndim](like.out_channels, like.out_channels, 3, padding=1)
            torch.nn.init.dirac_(layer.weight)
        layer.bias.zero_()
    return layer.to(like.weight).train(like.training).requires_grad_(like.weight.requires_grad)
