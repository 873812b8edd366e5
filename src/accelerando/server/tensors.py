"""Tensors of the Open Inference Protocol: its datatypes as numpy arrays, out of JSON values and raw bytes and back.

| datatype | array | in JSON | raw, little-endian and packed |
|---|---|---|---|
| BOOL | bool | true, false | a byte, 0 or 1 |
| INT8 ... INT64, UINT8 ... UINT64 | the same | whole numbers in range | two's complement |
| FP32, FP64 | float32, float64 | finite numbers in range | IEEE 754 |
| FP16 | float16 | never | IEEE 754 |
| BF16 | float32, for numpy has no such type | never | the upper half of a float32 |
| BYTES | object, of bytes | strings | for each element its length (4 bytes), then itself |

Source: the protocol's "tensor data" section and its binary tensor data extension.  Nothing here knows HTTP or gRPC.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from accelerando.errors import DataError
from accelerando.serve.binding import check_axes, fit
from accelerando.signature import Array, Port, Signature

Buffer = bytes | bytearray | memoryview
NUMBERS: dict[str, np.dtype[Any]] = {
    name: np.dtype(code).newbyteorder("<")
    for name, code in {
        "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "INT8": "i1", "INT16": "i2",
        "INT32": "i4", "INT64": "i8", "FP16": "f2", "FP32": "f4", "FP64": "f8",
    }.items()
}  # fmt: skip
DATATYPES = (*NUMBERS, "BF16", "BYTES")
RAW_ONLY = ("FP16", "BF16")
MOST_AXES = 32  # numpy 1 takes no more
MOST_ELEMENTS = 2**48  # beyond any memory; keeps products of axes within what numpy can count
_NAMES = {dtype: name for name, dtype in NUMBERS.items()}
_IN_JSON: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "true or false"),
    "i": (frozenset({int}), "whole numbers"),
    "u": (frozenset({int}), "whole numbers"),
    "f": (frozenset({int, float}), "numbers"),
    "O": (frozenset({str, bytes}), "strings"),
}


@lru_cache(maxsize=64)
def datatype_of(dtype: Any) -> str:
    """The protocol's name for a numpy dtype.

    Raises:
        DataError: the protocol has none, as for complex numbers.
    """
    kind = np.dtype(dtype)
    name = "BYTES" if kind.kind in "OSU" else _NAMES.get(kind.newbyteorder("<"))
    if name is None:
        raise DataError(f"the protocol has no datatype for {kind}; it has {', '.join(DATATYPES)}")
    return name


# --- in ---------------------------------------------------------------------------------------------------------


def from_raw(name: str, datatype: str, shape: Sequence[int], data: Buffer) -> Array:
    """A tensor from its packed bytes: a read-only view on them where their alignment allows it, else a copy.

    Args:
        name: for messages.
        shape: the lengths of its axes, as a list of whole numbers.
        data: exactly the tensor's bytes.

    Raises:
        DataError: no such datatype, a shape that is none, or another number of bytes.
    """
    count, view = _count(name, datatype, shape), memoryview(data)
    if datatype == "BYTES":
        return _strings(name, shape, count, view)
    half = datatype == "BF16"
    dtype = NUMBERS["UINT16"] if half else NUMBERS[datatype]
    if view.nbytes != count * dtype.itemsize:
        raise DataError(
            f"{name!r} is {datatype} of shape {_show(shape)}, which takes {count * dtype.itemsize} bytes, "
            f"but {view.nbytes} were given"
        )
    array: Array = np.frombuffer(view, dtype, count) if count else np.empty(0, dtype)
    if dtype.kind == "b" and count and array.view(np.uint8).max() > 1:
        raise DataError(f"{name!r} is BOOL, whose bytes must be 0 or 1, but one is {array.view(np.uint8).max()}")
    if half:
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (array if array.flags.aligned else array.copy()).reshape(shape)


def from_values(name: str, datatype: str, shape: Sequence[int], values: Iterable[Any]) -> Array:
    """A tensor from values of Python, such as JSON gives: flat in row-major order, or nested as the shape says.

    Raises:
        DataError: no such datatype, or one that has no values; a shape that is none; another number of values,
            values of another kind, out of range, or not finite.
    """
    count = _count(name, datatype, shape)
    if datatype in RAW_ONLY:
        raise DataError(f"{name!r} is {datatype}, which can't be given as values; give it as binary data")
    dtype = np.dtype(object) if datatype == "BYTES" else NUMBERS[datatype]
    flat = _flat(name, shape, values)
    if len(flat) != count:
        raise DataError(f"{name!r} has the shape {_show(shape)}, which takes {count} values, but {len(flat)} are there")
    kinds, words = _IN_JSON[dtype.kind]
    if not kinds.issuperset(map(type, flat)):
        strange = next(value for value in flat if type(value) not in kinds)
        raise DataError(f"{name!r} is {datatype}, so its values must be {words}, but one is {_brief(strange)}")
    if dtype.kind == "O":
        return _objects(shape, [_encoded(name, text) for text in flat])
    return (_floats if dtype.kind == "f" else _wholes)(name, datatype, dtype, flat).reshape(shape)


def bind(given: Mapping[str, tuple[str, Array]], signature: Signature) -> list[Array]:
    """The inputs in the signature's order, as the model takes them.

    Args:
        given: name -> (datatype, tensor).

    Raises:
        DataError: an input is missing, unknown, of another shape, of a type that can't be cast without loss; one
            holds no rows; axes that should agree do not.
    """
    ports = signature.inputs
    if given.keys() != {port.name for port in ports}:
        raise DataError(
            f"inputs named {_list(given)} were given, but the model takes {'; '.join(map(describe, ports))}"
        )
    leaves = [_fitted(port, *given[port.name]) for port in ports]
    if not leaves or len(leaves[0]) == 0:
        raise DataError("a request must hold at least one row, but its batch has none")
    check_axes(leaves, ports)
    return leaves


def describe(port: Port) -> str:
    """A port in the protocol's words, such as `x FP32 [-1,4]`."""
    return f"{port.name} {datatype_of(port.dtype)} {_show(wire_shape(port))}"


def wire_shape(port: Port) -> list[int]:
    """A port's shape in the protocol's way: -1 where an axis may change."""
    return [axis if isinstance(axis, int) else -1 for axis in port.shape]


def _fitted(port: Port, datatype: str, array: Array) -> Array:
    if array.dtype.kind == "O":
        array = _texts(port.name, array)
    if port.fits(array):
        return array
    try:
        return fit(array, port)
    except DataError as error:
        wanted, given = describe(port), f"{datatype} {_show(array.shape)}"
        raise DataError(f"the model takes {wanted}, but {port.name!r} was given as {given}: {error}") from error


def _texts(name: str, array: Array) -> Array:
    """Strings as backends take them: ONNX Runtime spells bytes as `b'...'`."""
    try:
        return _objects(array.shape, [item.decode("utf-8") for item in array.ravel()])
    except UnicodeDecodeError as error:
        raise DataError(f"{name!r} must hold text in UTF-8, but: {error}") from error


def _count(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements a shape has."""
    if datatype not in DATATYPES:
        raise DataError(f"{name!r} has the datatype {_brief(datatype)}; there are {', '.join(DATATYPES)}")
    whole = len(shape) <= MOST_AXES and {int}.issuperset(map(type, shape))
    if not whole or not 0 <= min(shape, default=0) <= max(shape, default=0) <= MOST_ELEMENTS:
        raise DataError(
            f"{name!r} has the shape {_brief(list(shape))}, which must be a list of at most {MOST_AXES} whole numbers, "
            f"none below 0"
        )
    count = math.prod(filter(None, shape))
    if count > MOST_ELEMENTS:
        raise DataError(f"{name!r} has the shape {_show(shape)}: more elements than any memory holds")
    return count if all(shape) else 0


def _flat(name: str, shape: Sequence[int], values: Iterable[Any]) -> list[Any]:
    """Nested lists as one, level by level; what is nested must be so as the shape says."""
    level = values if type(values) is list else list(values)
    axis = 0
    while level and type(level[0]) is list:
        if axis == 0 and shape and len(level) != shape[0]:
            raise DataError(f"{name!r} has the shape {_show(shape)}, but {len(level)} rows are there")
        axis += 1
        if axis >= len(shape):
            raise DataError(f"{name!r} has the shape {_show(shape)}, but its data is nested deeper")
        if set(map(type, level)) != {list}:
            raise DataError(f"{name!r} holds lists beside values on one level")
        if set(map(len, level)) != {shape[axis]}:
            wrong = next(len(part) for part in level if len(part) != shape[axis])
            raise DataError(f"{name!r} has the shape {_show(shape)}, but {wrong} elements are there along axis {axis}")
        level = list(chain.from_iterable(level))
    return level


def _wholes(name: str, datatype: str, dtype: np.dtype[Any], flat: list[Any]) -> Array:
    if dtype.kind != "b" and flat:
        bounds, low, high = np.iinfo(dtype), min(flat), max(flat)
        if low < bounds.min or high > bounds.max:
            wrong = low if low < bounds.min else high
            raise DataError(
                f"{name!r} is {datatype}, which holds {bounds.min} to {bounds.max}, but a value is {_brief(wrong)}"
            )
    return np.array(flat, dtype)


def _floats(name: str, datatype: str, dtype: np.dtype[Any], flat: list[Any]) -> Array:
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, np.float64).astype(dtype, copy=False)
    except OverflowError:  # a whole number beyond float64
        array = np.array([math.inf], dtype)
    if not np.isfinite(array).all():
        raise DataError(f"{name!r} is {datatype}, but a value is not finite, or too large for it")
    return array


def _strings(name: str, shape: Sequence[int], count: int, view: memoryview) -> Array:
    """Elements of BYTES out of their packed form."""
    found: list[bytes] = []
    at, end = 0, view.nbytes
    if 4 * count > end:
        raise DataError(f"{name!r} has {count} elements of at least 4 bytes each, but only {end} bytes were given")
    for i in range(count):
        length = struct.unpack_from("<I", view, at)[0] if at + 4 <= end else end
        if at + 4 + length > end:
            raise DataError(f"{name!r} ends within its element {i}: {end} bytes were given, which are too few")
        found.append(bytes(view[at + 4 : at + 4 + length]))
        at += 4 + length
    if at != end:
        raise DataError(f"{name!r} takes {at} bytes for its {count} elements, but {end} were given")
    return _objects(shape, found)


def _objects(shape: Sequence[int], items: Sequence[Any]) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(shape)


def _encoded(name: str, text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        raise DataError(f"{name!r} holds a string that is not Unicode: {error.reason}") from error


# --- out --------------------------------------------------------------------------------------------------------


def to_raw(array: Array, datatype: str | None = None) -> bytes:
    """A tensor's packed bytes.

    Args:
        datatype: the one to write, `BF16` for instance (rounded to nearest, ties to even); else the array's own.
    """
    packed = to_buffer(array, datatype)
    return packed if isinstance(packed, bytes) else packed.tobytes()


def to_buffer(array: Array, datatype: str | None = None) -> Array | bytes:
    """As `to_raw`, but without a copy where the array lies in memory as its bytes must."""
    datatype = datatype or datatype_of(array.dtype)
    if datatype == "BYTES":
        items = [_element(item) for item in array.ravel().tolist()]
        return b"".join(chain.from_iterable((struct.pack("<I", len(item)), item) for item in items))
    if datatype == "BF16":
        return _rounded(array)
    return np.ascontiguousarray(array, NUMBERS[datatype])


def to_values(array: Array) -> list[Any]:
    """A tensor's values in row-major order, for JSON.

    Raises:
        DataError: bytes that are not text.
    """
    if array.dtype.kind not in "OSU":
        return array.ravel().tolist()
    try:
        return [_element(item).decode("utf-8") for item in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise DataError(
            f"an output holds bytes that are not text ({error.reason}); ask for it as binary data"
        ) from error


def _element(item: Any) -> bytes:
    return item if isinstance(item, bytes) else str(item).encode("utf-8", "surrogatepass")


def _rounded(array: Array) -> Array:
    """The upper halves of float32, rounded to nearest, ties to even; NaN stays NaN."""
    single = np.ascontiguousarray(array, np.float32)
    bits = single.view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    upper = np.where(np.isnan(single), (bits >> np.uint32(16)) | np.uint32(0x40), upper)
    return upper.astype(NUMBERS["UINT16"])


# --- words ------------------------------------------------------------------------------------------------------


def _show(shape: Iterable[Any]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _list(names: Iterable[str]) -> str:
    return ", ".join(_brief(name) for name in names) or "nothing"


def _brief(value: Any) -> str:
    """A value from a stranger, for a message; a whole number may be too long to be spelled."""
    if type(value) is int and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
