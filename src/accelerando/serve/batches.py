"""Requests become one batch, and its answer goes back row by row to where each came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from accelerando.errors import RowsError
from accelerando.serve.tickets import Ticket
from accelerando.signature import Array, Signature

if TYPE_CHECKING:
    from accelerando.serve.company import Company

Run = Callable[[Sequence[Array]], list[Array]]


class Batch(NamedTuple):
    """Requests that are to run together: on which rung of which company, and why there."""

    tickets: list[Ticket]
    company: Company
    rung: int
    why: str

    @property
    def rows(self) -> int:
        return sum(map(_ROWS, self.tickets))


_ROWS = attrgetter("rows")  # quicker than a comprehension


def joinable(signature: Signature) -> bool:
    """Whether rows of several requests may share a batch: it is the first axis of every array, of any length."""
    return all(port.shape and isinstance(port.shape[0], str) for port in (*signature.inputs, *signature.outputs))


def join(tickets: Sequence[Ticket]) -> Sequence[Array]:
    """The inputs of all, row upon row; of one request its own, not copied."""
    if len(tickets) == 1:
        return tickets[0].leaves
    return [np.concatenate(leaves) for leaves in zip(*(t.leaves for t in tickets), strict=True)]


def split(answers: Sequence[Array], tickets: Sequence[Ticket]) -> list[list[Array]]:
    """Each request's own rows of the answers.

    Raises:
        RowsError: there are not as many rows in an answer as were asked.
    """
    if len(tickets) == 1:
        return [list(answers)]
    rows = sum(t.rows for t in tickets)
    for answer in answers:
        if len(answer) != rows:
            raise RowsError(f"{len(answer)} rows came back where {rows} were asked")
    parts, start = [], 0
    for ticket in tickets:
        parts.append([answer[start : start + ticket.rows] for answer in answers])
        start += ticket.rows
    return parts


def run_within(run: Run, leaves: Sequence[Array], most_rows: int) -> list[Array]:
    """The answers to one request of any number of rows, no more of them at a time than `most_rows`."""
    rows = len(leaves[0])
    if rows <= most_rows:
        return run(leaves)
    parts = [run(part) for part in _pieces(leaves, rows, most_rows)]
    return [np.concatenate(answers) for answers in zip(*parts, strict=True)]


def _pieces(leaves: Sequence[Array], rows: int, most_rows: int) -> Iterator[list[Array]]:
    for start in range(0, rows, most_rows):
        yield [leaf[start : start + most_rows] for leaf in leaves]
