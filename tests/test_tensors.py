from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from shelf import signature_of

from accelerando.errors import DataError
from accelerando.server.tensors import (
    DATATYPES,
    NUMBERS,
    bind,
    datatype_of,
    describe,
    from_raw,
    from_values,
    to_raw,
    to_values,
)

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4)
IN_JSON = [name for name in NUMBERS if name != "FP16"]


def nested(flat: list[Any], shape: Sequence[int]) -> list[Any]:
    """A flat list as the lists of lists that its shape says."""
    if len(shape) == 1:
        return flat
    size = math.prod(shape[1:])
    return [nested(flat[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


@st.composite
def tensors(draw: st.DrawFn, names: Sequence[str], finite: bool) -> tuple[str, np.ndarray]:
    name = draw(st.sampled_from(list(names)))
    dtype = NUMBERS[name]
    elements = hnp.from_dtype(dtype, allow_nan=not finite, allow_infinity=not finite)
    return name, draw(hnp.arrays(dtype, draw(SHAPES), elements=elements))


# --- there and back ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(tensors(list(NUMBERS), finite=False))
def test_any_tensor_comes_back_from_its_bytes(given_: tuple[str, np.ndarray]) -> None:
    name, array = given_
    raw = to_raw(array)
    assert len(raw) == array.nbytes
    back = from_raw("x", name, list(array.shape), raw)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()  # NaN too, bit by bit


@settings(deadline=None)
@given(tensors(IN_JSON, finite=True))
def test_any_finite_tensor_comes_back_from_json_flat_and_nested(given_: tuple[str, np.ndarray]) -> None:
    name, array = given_
    flat = json.loads(json.dumps(to_values(array), allow_nan=False))
    ways = [flat] if 0 in array.shape else [flat, nested(flat, array.shape)]
    for data in ways:
        back = from_values("x", name, list(array.shape), data)
        assert back.dtype == array.dtype
        assert back.shape == array.shape
        assert np.array_equal(back, array)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20), max_size=12))
def test_bytes_come_back_from_their_packed_form(items: list[bytes]) -> None:
    array = np.empty(len(items), object)
    array[:] = items
    raw = to_raw(array)
    assert raw == b"".join(struct.pack("<I", len(item)) + item for item in items)
    assert from_raw("x", "BYTES", [len(items)], raw).tolist() == items


@settings(deadline=None)
@given(st.lists(st.text(max_size=10), min_size=2, max_size=2))
def test_texts_come_back_from_json(texts: list[str]) -> None:
    array = from_values("x", "BYTES", [2, 1], nested(texts, [2, 1]))
    assert array.tolist() == [[texts[0].encode()], [texts[1].encode()]]
    assert to_values(array) == texts


@settings(deadline=None)
@given(hnp.arrays(np.float32, SHAPES, elements=st.floats(width=32)))
def test_bf16_is_the_nearest_upper_half_of_a_float(array: np.ndarray) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    raw = to_raw(array, "BF16")
    wanted = array.astype(ml_dtypes.bfloat16)
    back = from_raw("x", "BF16", list(array.shape), raw)
    assert back.dtype == np.float32
    assert np.array_equal(back, wanted.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("start", range(1, 9))
def test_bytes_that_lie_anywhere_are_read_right_and_end_up_aligned(start: int) -> None:
    array = np.arange(6, dtype=np.float64)
    body = memoryview(bytes(start) + array.tobytes())
    back = from_raw("x", "FP64", [2, 3], body[start:])
    assert back.flags.aligned
    assert np.array_equal(back.ravel(), array)


def test_aligned_bytes_are_not_copied() -> None:
    body = np.arange(1000, dtype=np.float32).tobytes()
    back = from_raw("x", "FP32", [10, 100], memoryview(body))
    assert np.shares_memory(back, np.frombuffer(body, np.uint8))


def test_an_array_that_is_not_contiguous_is_packed_in_row_major_order() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert to_raw(array) == struct.pack("<6i", 0, 3, 1, 4, 2, 5)
    assert to_values(array) == [0, 3, 1, 4, 2, 5]
    assert to_raw(array.astype(">i4")) == struct.pack("<6i", 0, 3, 1, 4, 2, 5)


def test_each_datatype_has_its_dtype() -> None:
    assert {name: datatype_of(dtype) for name, dtype in NUMBERS.items()} == {name: name for name in NUMBERS}
    assert datatype_of("object") == "BYTES"
    assert set(DATATYPES) == {*NUMBERS, "BF16", "BYTES"}
    with pytest.raises(DataError, match="no datatype for complex64"):
        datatype_of("complex64")


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("FP31", [1], b"1234", "datatype 'FP31'"),
        ("FP32", [2], b"1234567", "takes 8 bytes, but 7"),
        ("FP32", [1], b"12345678", "takes 4 bytes, but 8"),
        ("FP32", [-1], b"1234", "none below 0"),
        ("FP32", [True], b"1234", "none below 0"),
        ("FP32", [1.0], b"1234", "none below 0"),
        ("FP32", ["1"], b"1234", "none below 0"),
        ("FP32", [2**62, 2**62, 4], b"", "none below 0"),
        ("FP32", [2**40, 2**40], b"", "any memory"),
        ("FP32", [0, 2**40, 2**40], b"", "any memory"),
        ("FP32", [1] * 33, b"1234", "at most 32"),
        ("BOOL", [2], b"\x01\x02", "0 or 1"),
        ("BYTES", [1], b"", "at least 4 bytes"),
        ("BYTES", [1], b"\x05\x00\x00\x00abcd", "within its element 0"),
        ("BYTES", [2], b"\x04\x00\x00\x00abcd", "within its element 1"),
        ("BYTES", [1], b"\xff\xff\xff\xffabcd", "within its element 0"),
        ("BYTES", [1], b"\x01\x00\x00\x00abcd", "takes 5 bytes"),
        ("BYTES", [2**40], b"\x01\x00\x00\x00abcd", "at least 4 bytes each"),
    ],
)
def test_bytes_that_are_no_such_tensor_are_refused(datatype: str, shape: list[Any], data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        from_raw("x", datatype, shape, data)
    assert "'x'" in str(caught.value)


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "words"),
    [
        ("FP16", [1], [1.0], "as binary data"),
        ("BF16", [1], [1.0], "as binary data"),
        ("INT8", [1], [128], "holds -128 to 127, but a value is 128"),
        ("INT8", [1], [-129], "holds -128 to 127, but a value is -129"),
        ("UINT64", [1], [-1], "but a value is -1"),
        ("UINT64", [1], [2**64], "holds 0 to 18446744073709551615"),
        ("INT64", [1], [10**5000], "a whole number of 16610 bits"),
        ("INT32", [1], [1.0], "must be whole numbers, but one is 1.0"),
        ("INT32", [1], [True], "must be whole numbers, but one is True"),
        ("FP32", [1], [False], "must be numbers, but one is False"),
        ("FP32", [1], ["1"], "must be numbers, but one is '1'"),
        ("FP32", [1], [None], "must be numbers, but one is None"),
        ("FP32", [1], [{}], "must be numbers, but one is {}"),
        ("FP32", [1], [1e39], "not finite, or too large"),
        ("FP64", [1], [math.inf], "not finite"),
        ("FP64", [1], [math.nan], "not finite"),
        ("FP64", [1], [10**400], "not finite, or too large"),
        ("BOOL", [1], [1], "must be true or false, but one is 1"),
        ("BYTES", [1], [1], "must be strings, but one is 1"),
        ("BYTES", [1], ["\ud800"], "not Unicode"),
        ("FP32", [2], [1.0], "takes 2 values, but 1"),
        ("FP32", [2], [1.0, 2.0, 3.0], "takes 2 values, but 3"),
        ("FP32", [2, 2], [[1.0, 2.0]], "1 rows"),
        ("FP32", [2, 2], [[1.0], [2.0, 3.0]], "1 elements are there along axis 1"),
        ("FP32", [2, 2], [[1.0, 2.0], 3.0], "beside values"),
        ("FP32", [2, 2], [1.0, [2.0], 3.0, 4.0], "must be numbers, but one is"),
        ("FP32", [2], [[1.0], [2.0]], "nested deeper"),
        ("FP32", [1], [[[[[1.0]]]]], "nested deeper"),
    ],
)
def test_values_that_are_no_such_tensor_are_refused(
    datatype: str, shape: list[Any], values: list[Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        from_values("x", datatype, shape, values)


# --- what a model takes -----------------------------------------------------------------------------------------

TWO = signature_of(
    {"ids": ("int64", ("batch", "length")), "mask": ("float32", ("batch", "length"))}, {"y": ("float32", ("batch",))}
)
TEXTS = signature_of({"text": ("object", ("batch", 1))}, {"y": ("float32", ("batch",))})
IDS, MASK = np.ones((2, 3), np.int64), np.ones((2, 3), np.float32)


def test_inputs_are_put_into_the_order_of_the_signature() -> None:
    leaves = bind({"mask": ("FP32", MASK), "ids": ("INT64", IDS)}, TWO)
    assert leaves[0] is IDS
    assert leaves[1] is MASK
    assert describe(TWO.inputs[0]) == "ids INT64 [-1,-1]"


def test_what_can_be_cast_without_loss_is_cast() -> None:
    small = bind({"ids": ("UINT8", IDS.astype(np.uint8)), "mask": ("FP64", MASK.astype(np.float64))}, TWO)
    assert [leaf.dtype for leaf in small] == ["int64", "float32"]


def test_text_goes_to_the_model_as_strings() -> None:
    (leaf,) = bind({"text": ("BYTES", from_values("text", "BYTES", [2, 1], ["a", "é"]))}, TEXTS)
    assert leaf.tolist() == [["a"], ["é"]]
    with pytest.raises(DataError, match="UTF-8"):
        bind({"text": ("BYTES", from_raw("text", "BYTES", [1, 1], b"\x01\x00\x00\x00\xff"))}, TEXTS)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"ids": ("INT64", IDS)}, "inputs named 'ids' were given, but the model takes ids INT64 .*; mask FP32"),
        ({}, "inputs named nothing"),
        ({"ids": ("INT64", IDS), "mask": ("FP32", MASK), "more": ("FP32", MASK)}, "'more'"),
        ({"ids": ("FP32", MASK), "mask": ("FP32", MASK)}, r"takes ids INT64 \[-1,-1\], but 'ids' was given as FP32"),
        ({"ids": ("INT64", IDS[0]), "mask": ("FP32", MASK)}, r"given as INT64 \[3\]"),
        ({"ids": ("INT64", IDS[:, :2]), "mask": ("FP32", MASK)}, "length is 2 in 'ids', but 3 in 'mask'"),
        ({"ids": ("INT64", IDS[:0]), "mask": ("FP32", MASK[:0])}, "at least one row"),
        ({"ids": ("BYTES", np.full((2, 3), b"1", object)), "mask": ("FP32", MASK)}, "given as BYTES"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_refused(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        bind(inputs, TWO)
