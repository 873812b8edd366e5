"""JSON from strangers: parsed strictly, then held against a schema.  Standard library only.

Python's own parser takes NaN, repeated keys and any depth; a file that came by mail must not.

A schema is plain data:

    str, int, float, bool       that type (int is also a float, bool is neither)
    (str, int)                  any of these types
    Text(...), Number(...)      with bounds
    [schema]                    a list of it
    {"key": schema}             an object with these keys and no others
    Open({"key": schema})       an object with these keys, and any others
    Each(schema)                an object with any keys, every value of this schema
    Maybe(schema)               it, or null
    ANY                         anything
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerando.errors import BundleError

DEPTH = 64  # of nesting; a signature of nested dicts takes a dozen
ITEMS = 1_000_000  # in one list or object
ANY = object()
NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Text:
    """A string of at most `most` characters that matches a pattern as a whole; `what` says the pattern in words."""

    most: int = 10_000
    pattern: str = r"(?s).*"
    what: str = ""


@dataclass(frozen=True)
class Number:
    """A number within bounds; whole unless `kind` is float."""

    least: float = 0
    most: float = 2**63 - 1
    kind: type = int


@dataclass(frozen=True)
class Open:
    """An object with at least these keys."""

    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Each:
    """An object with any keys."""

    value: Any
    most: int = 1000


@dataclass(frozen=True)
class Maybe:
    """Null, or the schema."""

    schema: Any


def parse(text: bytes, where: str) -> Any:
    """The value of a JSON text: UTF-8, no repeated keys, finite numbers, at most `DEPTH` deep.

    Args:
        where: what the text is called in messages, such as `manifest.json`.

    Raises:
        BundleError: `not-json`; the message says what is wrong.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise BundleError("not-json", f"{where} is nested too deep; at most {DEPTH} levels are read") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise BundleError("not-json", f"{where} must be strict JSON in UTF-8, but: {error}") from error
    level, depth = [value], 0
    while level := [child for item in level for child in _children(item)]:
        depth += 1
        if depth > DEPTH:
            raise BundleError("not-json", f"{where} is nested too deep; at most {DEPTH} levels are read")
    return value


def canonical(value: Any) -> bytes:
    """The one text of a value: sorted keys, no spaces, ASCII, shortest numbers that read back the same.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def check(value: Any, schema: Any, where: str) -> None:
    """Hold a parsed value against a schema.

    Raises:
        BundleError: `field`; the message says which field, what it holds and what must be there.
    """
    match schema:
        case Maybe():
            if value is not None:
                check(value, schema.schema, where)
        case Text():
            _need(isinstance(value, str), value, where, "a string")
            _need(len(value) <= schema.most, value, where, f"at most {schema.most} characters")
            _need(
                re.fullmatch(schema.pattern, value) is not None,
                value,
                where,
                schema.what or f"text like {schema.pattern}",
            )
        case Number():
            check(value, schema.kind, where)
            _need(schema.least <= value <= schema.most, value, where, f"between {schema.least} and {schema.most}")
        case list():
            _need(isinstance(value, list) and len(value) <= ITEMS, value, where, "a list")
            for i, item in enumerate(value):
                check(item, schema[0], f"{where}[{i}]")
        case dict() | Open():
            _object(value, schema, where)
        case Each():
            _need(isinstance(value, dict) and len(value) <= schema.most, value, where, "an object")
            for key, item in value.items():
                check(item, schema.value, f"{where}.{key[:80]}")
        case type() | tuple():
            kinds = schema if isinstance(schema, tuple) else (schema,)
            _need(any(map(_is, [value] * len(kinds), kinds)), value, where, " or ".join(NAMES[k] for k in kinds))
        case _ if schema is not ANY:
            raise TypeError(f"{schema!r} is not a schema")


def _object(value: Any, schema: dict[str, Any] | Open, where: str) -> None:
    fields = schema.fields if isinstance(schema, Open) else schema
    _need(isinstance(value, dict), value, where, "an object")
    if missing := [k for k in fields if k not in value]:
        raise BundleError("field", f"{where}.{missing[0]} is missing, but must be there")
    if isinstance(schema, dict) and (unknown := [k for k in value if k not in fields]):
        raise BundleError("field", f"{where}.{unknown[0][:80]} is not a field of this schema; {', '.join(fields)} are")
    for key, inner in fields.items():
        check(value[key], inner, f"{where}.{key}")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _need(holds: bool, value: Any, where: str, what: str) -> None:
    if not holds:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise BundleError("field", f"{where} must be {what}, but is {shown}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        doubled = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {doubled[:80]!r} is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
