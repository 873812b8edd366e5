"""The words of the goal language, read and spelt; every complaint has a caret under what is wrong."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from accelerando.errors import GoalError, UsageError

TIME = {"us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}
RATE = {"/s": Decimal(1)}
BYTES = {"B": Decimal(1), "KB": Decimal(10**3), "MB": Decimal(10**6), "GB": Decimal(10**9),
         "KiB": Decimal(2**10), "MiB": Decimal(2**20), "GiB": Decimal(2**30)}  # fmt: skip
SHOWN = ("us", "ms", "s", "B", "KB", "MB", "GB")  # units in which figures are spelt, by growing size
PREFERENCES = ("quality", "speed")


@dataclass(frozen=True)
class Quantity:
    """What can be bounded.

    `least` is the only direction that makes sense (None where the metric decides); `trade` is speed, quality or
    room; `timed` is True where the figure depends on the batch; `example` is a bound on it as one writes it.
    """

    least: bool | None
    trade: str
    units: dict[str, Decimal]
    example: str
    percent: bool = False

    @property
    def timed(self) -> bool:
        return self.trade == "speed"


QUANTITIES = {
    "speedup": Quantity(True, "speed", {"x": Decimal(1)}, "speedup >= 4"),
    "latency": Quantity(False, "speed", TIME, "latency <= 3ms"),
    "p95": Quantity(False, "speed", TIME, "p95 <= 4ms"),
    "p99": Quantity(False, "speed", TIME, "p99 <= 5ms"),
    "throughput": Quantity(True, "speed", RATE, "throughput >= 2000/s"),
    "memory": Quantity(False, "room", BYTES, "memory <= 200MB"),
    "size": Quantity(False, "room", BYTES, "size <= 10MB"),
    "quality": Quantity(None, "quality", {}, "quality >= 0.97", percent=True),
    "drop": Quantity(False, "quality", {}, "drop <= 1%", percent=True),
}
# Other people's words -> ours; the first line is taken as it is, the others are only a hint in the complaint.
SAME = {"p50": "latency", "median": "latency"}
MEANT = {
    **dict.fromkeys(("accuracy", "acc", "f1", "iou", "mae", "mse", "rmse", "metric", "score", "error"), "quality"),
    **dict.fromkeys(("loss", "degradation", "regression"), "drop"),
    **dict.fromkeys(("faster", "speed", "acceleration", "gain"), "speedup"),
    **dict.fromkeys(("time", "delay", "mean", "average"), "latency"),
    **dict.fromkeys(("p90", "tail"), "p95"),
    **dict.fromkeys(("p999", "max"), "p99"),
    **dict.fromkeys(("fps", "rps", "qps", "ips", "rate"), "throughput"),
    **dict.fromkeys(("ram", "rss", "mem"), "memory"),
    **dict.fromkeys(("disk", "file", "weights"), "size"),
}
AT_LEAST, AT_MOST = (">=", ">", "≥", "=>"), ("<=", "<", "≤", "=<")
TOKEN = re.compile(
    r"(?P<sign>>=|=>|<=|=<|==|!=|>|<|≥|≤|=|:)|(?P<number>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<comma>[,;&]+)|(?P<at>@)|(?P<word>%|/?[A-Za-z\u00b5\u03bc\u00d7][\w/-]*)|(?P<odd>\S)"
)
EXAMPLE = "such as 'speedup >= 4, drop <= 1%'"


@dataclass(frozen=True)
class BoundText:
    """One bound as it was written, its value in base units."""

    quantity: str
    least: bool
    value: Decimal
    relative: bool
    start: int
    end: int


@dataclass(frozen=True)
class GoalText:
    """A goal as it was written; None where nothing was said."""

    bounds: tuple[BoundText, ...]
    batch: int | None
    prefer: str | None


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int


def read(text: str) -> GoalText:
    """The parts of a goal.

    Raises:
        GoalError: it is empty, has a word that is not known, or bounds that contradict each other.
    """
    return _Reader(text).goal()


def spell(quantity: str, value: Decimal, relative: bool) -> str:
    """A value in base units as the goal language writes it: exact, in the unit that keeps the number short."""
    if relative:
        return f"{_plain(value * 100)}%"
    units = QUANTITIES[quantity].units
    shown = [u for u in SHOWN if u in units]
    if shown:
        unit = next((u for u in reversed(shown) if abs(value) >= units[u]), shown[0])
        return f"{_plain(value / units[unit])}{unit}"
    return f"{_plain(value)}{'/s' if '/s' in units else ''}"


def _plain(value: Decimal) -> str:
    value = value.normalize() if value else Decimal(0)
    return f"{value:f}" if -7 <= value.adjusted() <= 15 else str(value)


def _nearest(word: str, known: Iterable[str]) -> str | None:
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


class _Reader:
    """Reads one goal from left to right."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"\s", " ", text)  # a caret line needs one line above it
        self.tokens = []
        for found in TOKEN.finditer(self.text):
            kind = found.lastgroup or "odd"
            kind = "comma" if kind == "word" and found[0].lower() == "and" else kind
            self.tokens.append(Token(kind, found[0], found.start(), found.end()))
        self.end = Token("end", "", len(self.text.rstrip()), len(self.text.rstrip()) + 1)
        self.place = 0
        self.bounds: list[BoundText] = []
        self.batch: int | None = None
        self.prefer: str | None = None

    def goal(self) -> GoalText:
        if not self.tokens:
            raise GoalError(f"the goal is empty; ask for something, {EXAMPLE}")
        while True:
            if self._peek().text.lower() == "prefer":
                self._prefer()
            elif self._peek().kind != "at":
                self.bounds.append(self._bound())
            if self._peek().kind == "at":
                self._at_batch()
            if self._peek().kind == "end":
                break
            comma = self._next()
            if comma.kind != "comma":
                raise self._wrong(comma, f"{comma.text!r} was not expected here; put a comma between two bounds")
            if self._peek().kind == "end":
                raise self._wrong(comma, "a bound is missing after the comma; write one, or leave the comma out")
        if not self.bounds:
            raise self._wrong(self.tokens[0], f"there is no bound in this goal; add one, {EXAMPLE}")
        return GoalText(tuple(self.bounds), self.batch, self.prefer)

    def _bound(self) -> BoundText:
        word = self._next()
        quantity = self._quantity(word)
        kind = QUANTITIES[quantity]
        sign = self._next()
        if sign.kind != "sign":
            raise self._wrong(sign, f"after {word.text!r} there must be >= or <=, such as '{kind.example}'")
        if sign.text not in AT_LEAST + AT_MOST:
            raise self._wrong(
                sign, f"{sign.text!r} can't be judged: a measured figure is never exactly so; write >= or <="
            )
        least = sign.text in AT_LEAST
        number = self._next()
        if number.kind != "number":
            raise self._wrong(
                number, f"after '{word.text} {sign.text}' there must be a number, such as '{kind.example}'"
            )
        value, relative = self._value(number, quantity)
        last = self.tokens[self.place - 1]
        self._sensible(quantity, least, value, word, last)
        return BoundText(quantity, least, value, relative, word.start, last.end)

    def _quantity(self, word: Token) -> str:
        lower = word.text.lower()
        if lower in QUANTITIES or lower in SAME:
            return SAME.get(lower, lower)
        every = f"There are {', '.join(QUANTITIES)}."
        if word.kind != "word":
            raise self._wrong(word, f"a bound begins with what is bounded, {EXAMPLE}. {every}")
        if lower == "batch":
            raise self._wrong(word, "the batch is written '@ batch 32', after the bounds")
        meant = MEANT.get(lower) or _nearest(word.text, (*QUANTITIES, *SAME))
        hint = f"; did you mean {meant!r}?" if meant else "."
        raise self._wrong(word, f"{word.text!r} is nothing that can be bounded{hint} {every}")

    def _value(self, number: Token, quantity: str) -> tuple[Decimal, bool]:
        """The value in base units, and whether it is a share of the original's."""
        kind, value = QUANTITIES[quantity], Decimal(number.text.replace("_", ""))
        if not math.isfinite(float(value)):
            raise self._wrong(number, "this number is too large")
        if quantity not in ("quality", "drop") and float(value) <= 0:
            raise self._wrong(number, f"a {quantity} is always above 0; write one that is, such as '{kind.example}'")
        if self._peek().kind != "word":
            if kind.units and quantity != "speedup":
                raise self._wrong(
                    number, f"a {quantity} needs a unit ({', '.join(kind.units)}), such as '{kind.example}'"
                )
            return value, False
        unit = self._next()
        if unit.text.lower() in (*QUANTITIES, *SAME, "prefer"):
            raise self._wrong(unit, f"{unit.text!r} was not expected here; put a comma between two bounds")
        if unit.text == "%":
            if not kind.percent:
                why = "only a drop and a quality are given in %"
                raise self._wrong(unit, f"{why}; write '{kind.example}'")
            return value / 100, quantity == "drop"
        known = {u.lower(): f for u, f in kind.units.items()}
        known |= {"\u00b5s": known["us"], "\u03bcs": known["us"]} if "us" in known else {}
        known |= {"\u00d7": known["x"]} if "x" in known else {}
        if unit.text.lower() in known:
            return value * known[unit.text.lower()], False
        takes = [*kind.units, *(["%"] if kind.percent else [])]
        meant = _nearest(unit.text, takes)
        hint = f"; did you mean {meant!r}?" if meant else "."
        raise self._wrong(unit, f"{unit.text!r} is no unit of {quantity}{hint} It takes {', '.join(takes)}.")

    def _sensible(self, quantity: str, least: bool, value: Decimal, first: Token, last: Token) -> None:
        """Raise where a bound contradicts another, or points where no bound makes sense."""
        whole = Token("bound", self.text[first.start : last.end], first.start, last.end)
        relative = last.text == "%" and quantity == "drop"
        for other in self.bounds:
            if other.quantity != quantity or other.relative != relative:
                continue
            if other.least != least:
                raise self._wrong(
                    whole, f"this contradicts '{self.text[other.start : other.end]}': keep one of the two"
                )
            same = "twice the same" if other.value == value else "two different bounds"
            raise self._wrong(whole, f"{quantity} is given {same}; keep the stricter one")
        wanted = QUANTITIES[quantity].least
        if wanted is not None and wanted != least:
            side, sign = ("lower", ">=") if wanted else ("upper", "<=")
            more = "more of it is never worse" if wanted else "less of it is never worse"
            raise self._wrong(
                whole, f"a {quantity} takes {side} bounds only, for {more}: write '{quantity} {sign} ...'"
            )

    def _at_batch(self) -> None:
        at, word = self._next(), self._next()
        if word.text.lower() != "batch":
            raise self._wrong(
                word if word.kind != "end" else at, "after @ there must be 'batch' and a number: '@ batch 32'"
            )
        number = self._next()
        if not re.fullmatch(r"\d{1,7}", number.text) or int(number.text) < 1:
            raise self._wrong(number, "a batch is a whole number from 1, such as '@ batch 32'")
        if self.batch is not None and self.batch != int(number.text):
            raise self._wrong(
                number, f"the goal asks for batch {self.batch} already; one batch holds for all its bounds"
            )
        self.batch = int(number.text)

    def _prefer(self) -> None:
        self._next()
        word = self._next()
        if word.text.lower() not in PREFERENCES:
            raise self._wrong(word, "one can prefer 'quality' or 'speed'")
        if self.prefer is not None and self.prefer != word.text.lower():
            raise self._wrong(word, f"the goal prefers {self.prefer} already; keep one")
        self.prefer = word.text.lower()

    def _peek(self) -> Token:
        return self.tokens[self.place] if self.place < len(self.tokens) else self.end

    def _next(self) -> Token:
        token = self._peek()
        self.place += 1
        return token

    def _wrong(self, token: Token, what: str) -> GoalError:
        """The goal, a caret line under the token, and what is wrong."""
        carets = " " * token.start + "^" * max(1, token.end - token.start)
        return GoalError(f"the goal can't be read:\n\n    {self.text.rstrip()}\n    {carets}\n{what}")


def is_number(given: Any, kind: type = Real) -> bool:
    """Whether what a caller gave is a number, and no truth value: any real one, or of a kind such as `Integral`."""
    return isinstance(given, kind) and not isinstance(given, bool)


def amount(given: str | float, units: dict[str, Decimal], name: str) -> float:
    """A number in base units, as it is or with a unit: 0.003, "3ms".

    Raises:
        UsageError: it is neither, or not finite.
    """
    if isinstance(given, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]+)\s*", given)
        with contextlib.suppress(ArithmeticError):
            if found and found[2] in units and math.isfinite(value := float(Decimal(found[1]) * units[found[2]])):
                return value
    elif is_number(given):
        with contextlib.suppress(OverflowError):
            if math.isfinite(given):
                return float(given)
    example = next(iter(units))
    raise UsageError(f"{name} must be a number or a text such as '20{example}' ({', '.join(units)}), but got {given!r}")
