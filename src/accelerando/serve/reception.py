"""What a caller gives becomes a request."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any

from accelerando.errors import DataError, DeadlineError
from accelerando.goal_text import TIME, amount, is_number
from accelerando.serve.aims import orientation
from accelerando.serve.binding import Binding
from accelerando.serve.company import Company
from accelerando.serve.tickets import MOST_PRIORITY, Ticket
from accelerando.signature import Array


def of_call(
    company: Company, binding: Binding, args: Sequence[Any], kwargs: Mapping[str, Any], deadline: str | float | None
) -> tuple[Ticket, Sequence[Any]]:
    """The request of a call, and the tensors among what was given.

    Raises:
        DataError: the arguments are not those of the model.
        DeadlineError: the deadline has passed.
    """
    leaves, tensors = binding.leaves(args, kwargs)
    return of_bound(company, leaves, None if deadline is None else amount(deadline, TIME, "deadline")), tensors


def of_leaves(
    company: Company,
    binding: Binding,
    leaves: Sequence[Array],
    seconds: float | None,
    min_quality: float | None,
    priority: int,
) -> Ticket:
    """The request of flat inputs, in the signature's order; arguments as `of_bound`, raises as `of_call`."""
    takes = ", ".join(map(str, binding.signature.inputs))
    if isinstance(leaves, (str, bytes, Mapping)) or not hasattr(leaves, "__len__"):
        raise DataError(f"a {type(leaves).__name__} was given, but must be a list of arrays, one for each of {takes}")
    if len(leaves) != len(binding.signature.inputs):
        raise DataError(f"{len(leaves)} inputs were given, but the model takes {takes}")
    if not is_number(priority, Integral) or not 0 <= priority <= MOST_PRIORITY:
        raise DataError(
            f"the priority is a whole number from 0 to {MOST_PRIORITY:,}, 1 the first and 0 the usual, but "
            f"{priority!r} was given"
        )
    seconds, min_quality = _number(seconds, "seconds"), _number(min_quality, "min_quality")
    return of_bound(company, binding.fit(leaves), seconds, min_quality, int(priority))


def _number(given: float | None, name: str) -> float | None:
    """A number that was given, if one was; it may be infinite."""
    if given is None:
        return None
    with suppress(OverflowError):
        if is_number(given) and not math.isnan(given):
            return float(given)
    raise DataError(f"{name} must be a number, or be left out, but {given!r} was given")


def of_bound(
    company: Company,
    leaves: Sequence[Array],
    seconds: float | None,
    min_quality: float | None = None,
    priority: int = 0,
) -> Ticket:
    """The request of flat inputs that were found to be what the model takes, and are not checked again.

    Args:
        seconds: until its deadline; what the goal allows, without it.
        min_quality: the least that will do, in the metric's own unit.
        priority: as `Ticket.priority`.

    Raises:
        DataError: there are no rows, or no rung that was not turned away promises that quality.
        DeadlineError: the deadline has passed.
    """
    rows = len(leaves[0]) if leaves and leaves[0].ndim else 1
    if rows == 0:
        raise DataError("a batch of no rows was given; give at least one")
    if seconds is not None and not seconds > 0:
        raise DeadlineError(f"the deadline was {seconds:g} s from now: it has passed; give more than 0")
    now = time.monotonic()
    patience = company.aims.patience if seconds is None else seconds
    floor = -math.inf if min_quality is None else _floor(company, min_quality)
    return Ticket(leaves, rows, now, now + patience, floor, priority)


def _floor(company: Company, quality: float) -> float:
    """A wanted quality, oriented; one that no rung promises is a mistake, not a matter of load."""
    sign = orientation(company.residents.bundle.ladder)
    if -math.inf < (best := company.attainable()) < sign * quality:
        raise DataError(
            f"a quality of {quality:g} was asked for, but no rung that runs here, and that the goal allows, promises "
            f"better than {sign * best:.4g}; ask for less"
        )
    return sign * quality
