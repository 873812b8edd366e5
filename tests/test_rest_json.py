"""JSON from strangers: what is quick about reading and writing it changes nothing about what is taken."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerando.errors import DataError
from accelerando.server import wire_json
from accelerando.server.wire_json import finite_text_of, read_json, text_of

TEXTS = st.text(st.sampled_from('ab:"\\{},é\u2028\x00 '), max_size=6) | st.text(max_size=4)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=5)


def both(text: bytes) -> tuple[Any, Any]:
    """What orjson's way and the standard library's alone make of a text: the value, or the message."""
    return outcome(text), alone(outcome, text)


def outcome(text: bytes) -> Any:
    try:
        return read_json(text)
    except DataError as error:
        return f"refused: {error}"


def alone(work: Any, *given: Any) -> Any:
    """What the standard library does by itself: with a quick one that takes nothing."""

    def takes_nothing(_: object) -> None:
        raise ValueError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_json, "orjson", SimpleNamespace(loads=takes_nothing))
        return work(*given)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 3]))
def test_every_object_is_read_as_it_was_written(value: dict[str, Any], escaped: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent).encode("utf-8", "surrogatepass")
    quick, slow = both(text)
    assert quick == slow
    if not isinstance(slow, str):  # half of a surrogate pair is no UTF-8
        assert quick == value


@given(OBJECTS, st.data())
def test_a_text_that_was_meddled_with_is_taken_or_refused_alike(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        text = (
            text[:at]
            + data.draw(st.sampled_from(["", ",", ":", '"', "\\", "{", "}", "[", "]", "1", "NaN"]))
            + text[at + cut :]
        )
    quick, slow = both(text.encode())
    assert quick == slow


@given(OBJECTS, st.sampled_from(['"a":1', '"a:":1', '"\\u0061":1', '"é":{"a":1}']), st.integers(0, 3))
def test_a_key_that_is_there_twice_is_found_wherever_it_is(value: dict[str, Any], pair: str, depth: int) -> None:
    inner = json.dumps(value)[1:-1]
    text = f"{{{pair},{inner}{', ' if inner else ''}{pair}}}"
    for level in range(depth):
        text = f"[{text}, 1]" if level % 2 else f'{{"in:side": {text}}}'
    text = text if text.startswith("{") else f'{{"list": {text}}}'
    for found in both(text.encode()):
        assert "is there twice" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 01}', "delimiter"),
        (b'{"a": "\x01"}', "control character"),
        (b'{"a": 1,}', "property name"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"\xef\xbb\xbf{}", "must be a JSON object"),
        (b"", "must be a JSON object"),
        (b'{"a":' * 1010 + b"1" + b"}" * 1010, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[1]", "but is a list of 1"),
    ],
)
def test_what_is_no_json_is_refused_with_its_reason(text: bytes, words: str) -> None:
    assert words in outcome(text)
    assert outcome(text) == alone(outcome, text)


def test_json_of_very_many_parts_is_refused_before_it_is_parsed() -> None:
    """Nobody else is served while it is parsed; each list takes as long as a hundred bytes."""
    text = b'{"inputs": [' + b"[]," * 60 + b"{}]}"
    assert len(read_json(text, most_parts=63)["inputs"]) == 61
    with pytest.raises(DataError, match=r"63 lists and objects, but at most 62 are taken; .* as one flat list"):
        read_json(text, most_parts=62)


def test_numbers_keep_their_value_and_their_kind() -> None:
    for literal in ("0", "-0.0", "1e5", "18446744073709551615", "-9223372036854775808", "0.1", "1e-400", "5e-324"):
        quick, slow = both(f'{{"x": {literal}}}'.encode())
        assert (type(quick["x"]), repr(quick["x"])) == (type(slow["x"]), repr(slow["x"]))
    quick, slow = both(b'{"x": 1e999, "y": 1}')
    assert quick == slow == {"x": math.inf, "y": 1}  # which is refused where it is used
    quick, slow = both(b'{"x": 18446744073709551616}')
    assert quick["x"] == float(slow["x"])  # beyond every whole-numbered datatype


@given(OBJECTS)
def test_what_is_written_reads_back(value: dict[str, Any]) -> None:
    assert json.loads(finite_text_of(value)) == json.loads(text_of(value)) == value


def test_what_orjson_does_not_write_the_standard_library_does() -> None:
    for strange in ({"id": "\ud800"}, {"x": 2**70}):
        assert json.loads(finite_text_of(strange)) == strange
    with pytest.raises(ValueError, match="JSON compliant"):
        text_of({"x": math.nan})
