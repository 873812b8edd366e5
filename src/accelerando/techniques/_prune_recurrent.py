"""Hidden units of LSTM, GRU and plain recurrent layers, which torch-pruning's graph can't follow.

Who reads a unit is found by experiment: it is moved, and the inputs of which layers move with it, and where?  Moving
many units at once, by the bits of their numbers, tells each reader's columns apart in a few runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerando.techniques._prune_groups import Cut, Group

Answer = Callable[[Any], Sequence[Any]]


def find_recurrent(model: Any, answer: Answer) -> list[Group]:
    """A group of each recurrent module's hidden units.

    One module's layers and directions have equally many: the unit that weighs least in each goes along with that of
    the others.
    """
    from torch import nn

    groups = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.RNNBase) and not layer.proj_size:
            readers = _readers(model, layer, answer)
            states, width = _states(layer), layer.hidden_size
            if readers and width > 1:
                orders = [_order(layer, k) for k in range(states)]
                units = tuple(tuple(k * width + orders[k][i] for k in range(states)) for i in range(width))
                every = tuple(range(states * width))
                cuts = (Cut(name, "hidden", cut_hidden, None, every, every), *readers)
                groups.append(Group(name, units, cuts, layers=states))
    return groups


# --- what one layer holds: units are numbered through its layers and directions --------------------------------------


def _states(layer: Any) -> int:
    return int(layer.num_layers) * (2 if layer.bidirectional else 1)


def _suffixes(layer: Any) -> list[str]:
    turns = ("", "_reverse") if layer.bidirectional else ("",)
    return [f"l{i}{turn}" for i in range(layer.num_layers) for turn in turns]


def parts(layer: Any, side: str, reading: bool) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """The weights that belong to a side's channels, and how values of their shape are summed by channel.

    Args:
        side: `in`, or `hidden`.
        reading: only those that read a channel; if not, those that make it too.
    """
    from torch.nn.functional import pad

    turns, width, states = (2 if layer.bidirectional else 1), layer.hidden_size, _states(layer)

    def placed(values: Any, first: int) -> Any:
        return pad(values, (first * width, states * width - first * width - len(values)))

    def columns(first: int) -> Callable[[Any], Any]:
        return lambda v: placed(v.sum(0), first)

    def rows_and_columns(first: int) -> Callable[[Any], Any]:
        return lambda v: placed(v.unflatten(0, (-1, width)).sum((0, 2)), first)

    for k, suffix in enumerate(_suffixes(layer)):
        if side == "in":
            if k < turns:
                yield f"weight_ih_{suffix}", lambda v: v.sum(0)
            continue
        below = (k // turns - 1) * turns
        yield f"weight_hh_{suffix}", columns(k)
        if below >= 0:
            yield f"weight_ih_{suffix}", columns(below)
        if not reading:
            for kind in ("ih", "hh"):
                name = f"weight_{kind}_{suffix}"
                yield name, rows_and_columns(k)


def _order(layer: Any, k: int) -> list[int]:
    """The units of one state, the lightest first."""
    width = layer.hidden_size
    weight = sum(by(getattr(layer, name).detach() ** 2) for name, by in parts(layer, "hidden", reading=False))
    return weight[k * width : (k + 1) * width].argsort(stable=True).tolist()


def ignore(layer: Any, side: str, where: Sequence[int]) -> None:
    """Zero a layer's weights for some of its inputs, or for some of its own hidden units."""
    for name, at in _columns(layer, side, where):
        getattr(layer, name)[:, at] = 0


def _columns(layer: Any, side: str, where: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """The columns, weight by weight, that read these channels."""
    turns, width = (2 if layer.bidirectional else 1), layer.hidden_size
    for k, suffix in enumerate(_suffixes(layer)):
        if side == "in":
            if k < turns:
                yield f"weight_ih_{suffix}", list(where)
            continue
        yield f"weight_hh_{suffix}", [i - k * width for i in where if i // width == k]
        below = (k // turns - 1) * turns
        if below >= 0:
            yield f"weight_ih_{suffix}", [i - below * width for i in where if below <= i // width < below + turns]


def cut_inputs(layer: Any, where: list[int]) -> Any:
    """Take inputs away, in place."""
    _drop_columns(layer, "in", where)
    layer.input_size -= len(where)
    return layer


def cut_hidden(layer: Any, where: list[int]) -> Any:
    """Take hidden units away, in place: equally many of each layer and direction."""
    from torch import nn

    width = layer.hidden_size
    _drop_columns(layer, "hidden", where)
    for k, suffix in enumerate(_suffixes(layer)):
        gone = {i - k * width for i in where if i // width == k}
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if layer.bias else ("weight_ih", "weight_hh"):
            old = getattr(layer, f"{kind}_{suffix}")
            kept = [i for i in range(len(old)) if i % width not in gone]  # gates lie one after the other
            setattr(layer, f"{kind}_{suffix}", nn.Parameter(old[kept]))
    layer.hidden_size -= len(where) // _states(layer)
    return layer


def _drop_columns(layer: Any, side: str, where: list[int]) -> None:
    from torch import nn

    for name, at in list(_columns(layer, side, where)):
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(old[:, sorted(set(range(old.shape[1])) - set(at))]))


# --- who reads it ----------------------------------------------------------------------------------------------------


def _readers(model: Any, layer: Any, answer: Answer) -> list[Cut]:
    """The layers that read a recurrent layer's units, and by which columns; none where that can't be told."""
    from torch import nn

    kinds = (nn.Linear, nn.RNNBase, nn.modules.conv._ConvNd)
    watched = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m is not layer}
    count = _states(layer) * layer.hidden_size
    still = _inputs(watched, model, answer)
    moved: dict[str, list[tuple[Any, Any]]] = {name: [] for name in still}
    for bit in range(max(1, (count - 1).bit_length())):
        pair = []
        for value in (0, 1):
            handle = layer.register_forward_hook(_mover([i for i in range(count) if i >> bit & 1 == value]))
            try:
                pair.append(_inputs(watched, model, answer))
            except (TypeError, AttributeError, ValueError):  # it gives something else than a tensor and its states
                return []
            finally:
                handle.remove()
        for name, before in still.items():
            moved[name].append(tuple(_moved(watched[name], before, after[name]) for after in pair))
    return [cut for name, pairs in moved.items() if (cut := _reader(name, watched[name], pairs, count))]


def _inputs(watched: dict[str, Any], model: Any, answer: Answer) -> dict[str, list[Any]]:
    """What each layer is given in a run, call by call."""
    seen: dict[str, list[Any]] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(_: Any, args: Any) -> None:
            if args and hasattr(args[0], "shape"):
                seen.setdefault(name, []).append(args[0].detach().clone())

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in watched.items()]
    try:
        answer(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _mover(units: list[int]) -> Callable[..., Any]:
    """A hook that moves some units, wherever a recurrent layer tells of them."""

    def hook(layer: Any, _: Any, result: Any) -> Any:
        output, states = result
        width, count = layer.hidden_size, _states(layer)
        last = count - output.shape[-1] // width  # the states of the last layer are those that the output holds
        shift = output.new_zeros(count * width)
        shift[units] = 1
        many = states if isinstance(states, tuple) else (states,)
        moved = tuple(s + shift.view(count, *[1] * (s.dim() - 2), width) for s in many)
        return output + shift[last * width :], moved if isinstance(states, tuple) else moved[0]

    return hook


def _moved(layer: Any, before: list[Any], after: list[Any]) -> Any:
    """Which of a layer's input channels changed in any call."""
    from torch import nn

    axis = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    return sum((a != b).movedim(axis, 0).flatten(1).any(1) for a, b in zip(before, after, strict=True)) > 0


def _reader(name: str, layer: Any, pairs: list[tuple[Any, Any]], count: int) -> Cut | None:
    """The cut of a layer each of whose columns moves with one unit or none; None where it moves with many or none."""
    from torch import nn
    from torch_pruning.ops import module2type
    from torch_pruning.pruner.function import PrunerBox

    number = sum((one.long() << bit for bit, (_, one) in enumerate(pairs)), start=0)
    often = sum(zero.long() + one.long() for zero, one in pairs)  # once per bit, if it is one unit's
    touched = often > 0
    if not touched.any() or not (often[touched] == len(pairs)).all() or any((z & o).any() for z, o in pairs):
        return None
    where = touched.nonzero().flatten().tolist()
    prune = cut_inputs if isinstance(layer, nn.RNNBase) else PrunerBox[module2type(layer)].prune_in_channels
    return Cut(name, "in", prune, None, tuple(where), tuple(number[touched].tolist()))
