"""How a model is called and what it answers, as plain data.

A call `model(x, mask=m)` and its answer are trees; every backend sees only their leaves, a flat list of arrays.
A `Node` is the JSON description of one tree:

    {"leaf": 0}                                 the array with this number
    {"tuple": [...]}, {"list": [...]}, {"dict": {...}}
    {"object": "SequenceClassifierOutput", "fields": {...}}     ModelOutput, dataclass, named tuple
    {"const": value}                            None, bool, int, float or str: part of the program, not an input
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accelerando.errors import DataError

Array = NDArray[Any]
Node = dict[str, Any]
CONSTANTS = (bool, int, float, str, type(None))


class Fields(dict[str, Any]):
    """An answer with named fields: reads by name, by attribute and by position, like a `ModelOutput`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"no field {name!r}; there are {', '.join(self)}") from error

    def __getitem__(self, key: Any) -> Any:
        return list(self.values())[key] if isinstance(key, (int, slice)) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


@dataclass(frozen=True)
class Port:
    """One array that goes in or comes out: its name, numpy dtype, and shape.

    A shape holds a number where the axis is fixed and a name where it may change; axis 0 is always `batch`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def fits(self, array: Array) -> bool:
        """Whether an array has this dtype, rank and every fixed axis."""
        dtype, fixed = self._wanted
        shape = array.shape
        if array.dtype != dtype or len(shape) != len(self.shape):
            return False
        for axis, length in fixed:  # noqa: SIM110  every request comes by here, and a generator takes twice as long
            if shape[axis] != length:
                return False
        return True

    @cached_property
    def _wanted(self) -> tuple[np.dtype[Any], tuple[tuple[int, int], ...]]:
        """The dtype, and the fixed axes with their lengths."""
        fixed = tuple((axis, length) for axis, length in enumerate(self.shape) if isinstance(length, int))
        return np.dtype(self.dtype), fixed

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Port:
        return cls(data["name"], data["dtype"], tuple(data["shape"]))


@dataclass(frozen=True)
class Signature:
    """How a model is called.

    `parameters` are the names of the call's parameters, in order; `arguments` maps each that is given to its
    node; the first `positional` of them are passed by position.  `result` is the tree of the answer.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: tuple[str, ...]
    positional: int
    arguments: Node
    result: Node

    @property
    def fixed_batch(self) -> int | None:
        """The one batch size that the model takes, or None where any will do."""
        size = self.inputs[0].shape[0]
        return size if isinstance(size, int) else None

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The flat leaves of one call, in the order of `inputs`, as they were given (arrays or tensors).

        Raises:
            DataError: an argument is missing, unknown, or of another structure.
        """
        if len(args) > len(self.parameters):
            raise DataError(f"{len(args)} arguments were given, but the model takes ({', '.join(self.parameters)})")
        given = dict(zip(self.parameters, args, strict=False))
        if doubled := given.keys() & kwargs.keys():
            raise DataError(f"{sorted(doubled)[0]!r} was given twice, by position and by name")
        given.update(kwargs)
        slots: list[Any] = [None] * len(self.inputs)
        for name, node in self.arguments.items():
            if name in given:
                _fill(node, given.pop(name), slots, name)
            elif any(True for _ in _leaves(node)):
                raise DataError(f"the argument {name!r} is missing; the model takes {', '.join(map(str, self.inputs))}")
        if unknown := [name for name, value in given.items() if value is not None]:
            raise DataError(
                f"the argument {unknown[0]!r} was not there when the model was optimized, which takes "
                f"{', '.join(map(str, self.inputs))}; optimize with data that holds it"
            )
        return slots

    def call(self, leaves: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments, by position and by name, with which the original takes these leaves."""
        names = list(self.arguments)
        args = [unflatten(self.arguments[name], leaves) for name in names[: self.positional]]
        return args, {name: unflatten(self.arguments[name], leaves) for name in names[self.positional :]}

    def answer(self, leaves: Sequence[Any]) -> Any:
        """The model's answer from its flat leaves, in the original's structure."""
        return unflatten(self.result, leaves)

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": [p.to_json() for p in self.inputs],
            "outputs": [p.to_json() for p in self.outputs],
            "parameters": list(self.parameters),
            "positional": self.positional,
            "arguments": self.arguments,
            "result": self.result,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Signature:
        return cls(
            tuple(Port.from_json(p) for p in data["inputs"]),
            tuple(Port.from_json(p) for p in data["outputs"]),
            tuple(data["parameters"]),
            data["positional"],
            data["arguments"],
            data["result"],
        )


def flatten(value: Any) -> tuple[list[Any], Node]:
    """The arrays or tensors in a value, and the node that puts them back.

    Raises:
        DataError: the value holds something that is neither an array, a container nor a constant.
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves)


def _flatten(value: Any, leaves: list[Any]) -> Node:
    if isinstance(value, CONSTANTS):
        return {"const": value}
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        leaves.append(value)
        return {"leaf": len(leaves) - 1}
    if isinstance(value, Mapping):
        fields = {str(k): _flatten(v, leaves) for k, v in value.items()}
        plain = type(value).__name__ in ("dict", "OrderedDict", "mappingproxy")
        return {"dict": fields} if plain else {"object": type(value).__name__, "fields": fields}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = {k: _flatten(v, leaves) for k, v in zip(value._fields, value, strict=True)}
        return {"object": type(value).__name__, "fields": fields}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_flatten(v, leaves) for v in value]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _flatten(getattr(value, f.name), leaves) for f in dataclasses.fields(value)}
        return {"object": type(value).__name__, "fields": fields}
    raise DataError(
        f"a {type(value).__name__} was found where an array, a tensor or a tuple, list or dict of them must be; "
        "convert it, or wrap the model so that it takes and gives arrays"
    )


def unflatten(node: Node, leaves: Sequence[Any]) -> Any:
    """The value that a node describes, with these leaves in their places."""
    match node:
        case {"leaf": int(index)}:
            return leaves[index]
        case {"const": value}:
            return value
        case {"tuple": list(items)}:
            return tuple(unflatten(item, leaves) for item in items)
        case {"list": list(items)}:
            return [unflatten(item, leaves) for item in items]
        case {"dict": dict(fields)}:
            return {k: unflatten(v, leaves) for k, v in fields.items()}
        case {"object": str(), "fields": dict(fields)}:
            return Fields({k: unflatten(v, leaves) for k, v in fields.items()})
    raise ValueError(f"{node} is not a node")


def to_numpy(value: Any) -> Array:
    """An array from an array, a tensor on any device, or a number; no copy where none is needed."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu().resolve_conj().resolve_neg()
        return np.asarray(value.float() if str(value.dtype) == "torch.bfloat16" else value)
    return np.asarray(value)


def name_axes(observed: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[int | str, ...]]:
    """Shapes with a name for each axis that was seen to change.

    Args:
        observed: [observation][port] -> the shape seen.  Axis 0 of every port is `batch`.

    Axes that always had the same lengths share a name (`dim_1`, ...), so that a backend may rely on it.
    """
    histories: dict[tuple[int, ...], str] = {}
    shapes: list[tuple[int | str, ...]] = []
    for port in range(len(observed[0])):
        seen = list(zip(*(shapes_[port] for shapes_ in observed), strict=True))  # per axis: its lengths
        axes: list[int | str] = []
        for axis, lengths in enumerate(seen):
            if axis == 0:
                axes.append("batch")
            elif len(set(lengths)) == 1:
                axes.append(lengths[0])
            else:
                axes.append(histories.setdefault(lengths, f"dim_{len(histories) + 1}"))
        shapes.append(tuple(axes))
    return shapes


def _leaves(node: Node) -> Any:
    """The numbers of a node's leaves."""
    match node:
        case {"leaf": int(index)}:
            yield index
        case {"tuple": items} | {"list": items}:
            for item in items:
                yield from _leaves(item)
        case {"dict": fields} | {"fields": fields}:
            for item in fields.values():
                yield from _leaves(item)


def _fill(node: Node, value: Any, slots: list[Any], where: str) -> None:
    """Put the leaves of a value that has a node's structure into their slots."""
    match node:
        case {"leaf": int(index)} if hasattr(value, "shape"):
            slots[index] = value
        case {"leaf": int(index)} if isinstance(value, (int, float, list)) and not isinstance(value, bool):
            try:
                slots[index] = np.asarray(value)
            except ValueError as error:
                raise DataError(f"{where!r} can't become an array: {error}; make its rows equally long") from error
        case {"const": constant}:
            same = constant == value or (isinstance(constant, float) and math.isnan(constant))
            if not same and value is not None:
                raise DataError(f"{where!r} was {constant!r} when the model was optimized and can't become {value!r}")
        case {"tuple": items} | {"list": items} if isinstance(value, (tuple, list)) and len(value) == len(items):
            for i, (item, part) in enumerate(zip(items, value, strict=True)):
                _fill(item, part, slots, f"{where}[{i}]")
        case {"dict": fields} | {"fields": fields} if isinstance(value, Mapping) and fields.keys() == value.keys():
            for key, item in fields.items():
                _fill(item, value[key], slots, f"{where}[{key!r}]")
        case _:
            raise DataError(f"{where!r} is {_given(value)}, but must be {_wanted(node)}")


def _given(value: Any) -> str:
    """What was given in place of an argument, in words."""
    match value:
        case None:
            return "None"
        case tuple() | list() | Mapping():
            return f"a {type(value).__name__} of {len(value)}"
    return f"of type {type(value).__name__}"


def _wanted(node: Node) -> str:
    """What a node's value must be, in words."""
    match node:
        case {"tuple": items} | {"list": items}:
            return f"a tuple or list of {len(items)}"
        case {"dict": fields} | {"fields": fields}:
            return f"a dict of {', '.join(fields)}"
    return "an array or a tensor"
