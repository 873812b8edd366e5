"""JSON as the protocols carry it: read strictly, for it comes from strangers, and written without spaces.

orjson does both, some ten times as quickly as the standard library.  What it does not take is read again by the
standard library, which says what is wrong with it, and decides.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import orjson

from accelerando.errors import DataError


def read_json(text: bytes, most_parts: int | None = None) -> dict[str, Any]:
    """A JSON object: UTF-8, no repeated keys, no NaN.

    Args:
        most_parts: lists and objects that it may hold.  The parser keeps the interpreter to itself, and for each of
            them it takes a hundred times as long as for a byte.

    Raises:
        DataError: it is none, or holds more.
    """
    if most_parts is not None and (parts := text.count(b"[") + text.count(b"{")) > most_parts:
        raise DataError(
            f"the JSON holds {parts:,} lists and objects, but at most {most_parts:,} are taken; give a tensor's data "
            f"as one flat list, or send it as binary data"
        )
    try:
        value = _parsed(text)
    except RecursionError as error:
        raise DataError("the JSON is nested too deep") from error
    except ValueError as error:  # of JSON, of UTF-8, or of a number with thousands of digits
        raise DataError(f"the body must be a JSON object in UTF-8, but: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise DataError(f"the body must be a JSON object, but is {brief(value)}")
    return value


def text_of(value: Any) -> bytes:
    """JSON without spaces, ASCII only.

    Raises:
        ValueError: it holds a number that is not finite.
    """
    return _ENCODER.encode(value).encode("ascii")


def finite_text_of(value: Any) -> bytes:
    """As `text_of`, in UTF-8, of a value whose numbers are known to be finite: this does not look."""
    try:
        return orjson.dumps(value)
    except TypeError:  # half of a surrogate pair, which JSON can spell and UTF-8 can't; a very large number
        return text_of(value)


def brief(value: Any) -> str:
    """A value from a stranger, for a message."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if type(value) is int and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _parsed(text: bytes) -> Any:
    """The value of a text.  (Of whole numbers beyond 64 bits orjson gives the nearest float; no datatype holds them.)

    Of keys that are there twice orjson keeps the last and says nothing.  But each has its colon: where as many keys
    are found as there are colons, none was lost, and where there are more, the strict decoder counts for itself.
    """
    try:
        value = orjson.loads(text)
    except ValueError:
        pass
    else:
        if _keys(value) == text.count(b":"):
            return value
    return _DECODER.decode(text.decode("utf-8"))


def _keys(value: Any) -> int:
    """How many keys an object and those within it have; some may be passed over, for data can be long."""
    if type(value) is dict:
        return len(value) + sum(map(_keys, value.values()))
    if type(value) is list and value and type(value[0]) is dict:
        return sum(map(_keys, value))
    return 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {doubled[:60]!r} is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
