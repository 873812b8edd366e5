"""Between a call of the model and flat arrays: what goes in is bound, cast and checked; answers get their form."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from accelerando.errors import DataError
from accelerando.signature import Array, Port, Signature, to_numpy


class Binding:
    """The arguments and answers of one model, prepared for a quick yes to calls that are as they must be.

    Tensors in give tensors out, on the device of the first; arrays in give arrays out; the structure is the
    original's (a `ModelOutput` becomes a `Fields`, read in the same ways).  Floats are cast to the model's floats
    and whole numbers to its whole numbers where the values fit; floats never become whole numbers.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._slots = [_Slot(port) for port in signature.inputs]
        leaves = {name: node["leaf"] for name, node in signature.arguments.items() if node.keys() == {"leaf"}}
        self._flat = leaves if len(leaves) == len(signature.inputs) else {}  # parameter -> input; else `bind` it
        free = [axis for axis in signature.inputs[0].shape if isinstance(axis, str)]
        alone = list(signature.arguments.values()) == [{"leaf": 0}] and len(free) == len(set(free))
        self._only = self._slots[0] if alone else None
        self._bare = signature.result == {"leaf": 0}

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Sequence[Array], Sequence[Any]]:
        """The flat inputs of a call, and the tensors that were among its arguments.

        Raises:
            DataError: the arguments are not those of the model, or of other types or shapes.
        """
        if self._only and not kwargs and len(args) == 1 and self._only.takes(args[0]):
            return args, ()
        given = self._bind_flat(args, kwargs) or self.signature.bind(args, kwargs)
        torch = sys.modules.get("torch")  # there can be no tensor where nobody imported it
        tensors = [x for x in given if isinstance(x, torch.Tensor)] if torch else []
        return self.fit([_array_of(x) for x in given] if tensors else given), tensors

    def fit(self, given: Sequence[Any]) -> list[Array]:
        """Flat inputs as the model takes them.  Raises as `leaves`."""
        leaves = [x if s.takes(x) else fit(x, s.port) for x, s in zip(given, self._slots, strict=True)]
        check_axes(leaves, self.signature.inputs)
        return leaves

    def answer(self, leaves: Sequence[Any], tensors: Sequence[Any]) -> Any:
        """Flat answers in the original's structure; as tensors where tensors were given."""
        if tensors:
            leaves = [_tensor_of(sys.modules["torch"], x, tensors[0].device) for x in leaves]
        return leaves[0] if self._bare else self.signature.answer(leaves)

    def _bind_flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The leaves of a call in which every argument is one array; None where that is not so."""
        if len(args) + len(kwargs) != len(self._slots):
            return None
        if args:
            kwargs = {**dict(zip(self.signature.parameters, args, strict=False)), **kwargs}
        if kwargs.keys() != self._flat.keys():
            return None
        leaves: list[Any] = [None] * len(kwargs)
        for name, index in self._flat.items():
            leaves[index] = kwargs[name]
        return leaves if all(hasattr(x, "shape") for x in leaves) else None


class _Slot:
    """What an input must be, prepared for a quick yes."""

    def __init__(self, port: Port) -> None:
        self.port = port
        self.dtype = np.dtype(port.dtype)
        self.rank = len(port.shape)
        fixed = [i for i in range(self.rank + 1) if all(isinstance(axis, int) for axis in port.shape[i:])]
        self.start = fixed[0]  # from this axis on all are fixed
        self.tail = port.shape[self.start :]
        self.rest = [(i, axis) for i, axis in enumerate(port.shape[: self.start]) if isinstance(axis, int)]

    def takes(self, array: Any) -> bool:
        """Whether it can go in as it is; where not, `fit` makes it so or says why not."""
        return (
            type(array) is np.ndarray
            and array.dtype == self.dtype
            and array.ndim == self.rank
            and array.shape[self.start :] == self.tail
            and (not self.rest or all(array.shape[i] == axis for i, axis in self.rest))
            and array.flags.c_contiguous
        )


def fit(value: Any, port: Port) -> Array:
    """An input as the model takes it: an array of the port's dtype and shape, contiguous.

    Raises:
        DataError: the dtype would lose what was given, or the shape is another.
    """
    array = _array_of(value)
    if array.dtype != port.dtype:
        array = _cast(array, port)
    if not port.fits(array):
        hint = ""
        if array.ndim == len(port.shape) and isinstance(port.shape[0], int) and len(array) != port.shape[0]:
            hint = f"; it was exported for batches of {port.shape[0]} rows and takes no others: split or pad the batch"
        elif array.ndim == len(port.shape) - 1:
            hint = "; axis 0 is the batch: a single sample goes in as x[None]"
        raise DataError(f"an input of shape {array.shape} was given, but the model takes {port}{hint}")
    return np.ascontiguousarray(array)


def _cast(array: Array, port: Port) -> Array:
    kind, want = array.dtype.kind, np.dtype(port.dtype)
    if want.kind == "f" and kind in "fiub":
        with np.errstate(over="ignore"):
            cast = array.astype(want)
        if not np.isfinite(cast).all() and (lost := array[np.isfinite(array) & ~np.isfinite(cast)]).size:
            raise DataError(
                f"an input of {array.dtype} holds {lost[0]:g}, but the model takes {port}, which holds no more than "
                f"{np.finfo(want).max:g}; scale or clip it"
            )
        return cast
    if want.kind in "iu" and kind in "iub":
        bounds = np.iinfo(want)
        if kind == "b" or not array.size or (array.min() >= bounds.min and array.max() <= bounds.max):
            return array.astype(want)
        raise DataError(
            f"an input of {array.dtype} holds {array.min()} to {array.max()}, but the model takes {port}, "
            f"which holds {bounds.min} to {bounds.max}"
        )
    raise DataError(
        f"an input of {array.dtype} was given, but the model takes {port}; this cast would lose what was given: "
        f"convert it yourself where that is meant"
    )


def check_axes(leaves: Sequence[Array], ports: Sequence[Port]) -> None:
    """Raises DataError where axes that share a name, such as the batch, differ in length."""
    lengths: dict[str, tuple[int, str]] = {}
    for leaf, port in zip(leaves, ports, strict=True):
        for axis, length in zip(port.shape, leaf.shape, strict=True):
            if isinstance(axis, str):
                known, where = lengths.setdefault(axis, (length, port.name))
                if known != length:
                    raise DataError(
                        f"{axis} is {known} in {where!r}, but {length} in {port.name!r}; they must be the same"
                    )


def _array_of(value: Any) -> Array:
    """The array of an array, a tensor or a list, without a copy where it lies in main memory.

    Raises:
        DataError: it can't become one.
    """
    try:
        return to_numpy(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"a {type(value).__name__} was given that can't become an array: {error}; give a dense array, or a tensor "
            "of a usual type that holds its values"
        ) from error


def _tensor_of(torch: Any, array: Array, device: Any) -> Any:
    own = array if array.flags.writeable and array.flags.c_contiguous else array.copy()
    tensor = torch.from_numpy(own)
    return tensor if device.type == "cpu" else tensor.to(device)
