"""What can be saved of a batch that failed: each request is tried by itself, and of one that fails again its rows.

The rows of a request are one unit for its caller, so that one answer goes back or one error.  That error names the
rows that fail by themselves, found by halving, for whoever sent eight pictures wants to know which one is broken.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from accelerando.errors import BundleError, ClosedError, RowsError
from accelerando.serve.batches import Batch, joinable
from accelerando.serve.company import Company, GoneError
from accelerando.serve.isolation import LostError, StartError
from accelerando.serve.tickets import Ticket
from accelerando.signature import Array
from accelerando.workload import filled

log = logging.getLogger(__name__)
TRIES = 2  # rungs that a request may fail on
FAILURES = 3  # in a row, of requests that another rung then answered: the rung is given up
PROBES = 32  # calls at most in search of a request's poisonous rows, and
PROBE_SECONDS = 1.0  # none is begun after so long: others wait
NAMED = 10  # rows that an error names at most


@dataclass(frozen=True)
class Saved:
    """What became of one request: its answers and the rung that gave them, or the error."""

    ticket: Ticket
    rung: int = -1
    answers: list[Array] = field(default_factory=list)
    why: str = ""
    start: float = 0.0
    end: float = 0.0
    error: Exception | None = None


class Salvage:
    """Tries again what failed.  For one thread at a time.

    Args:
        cores: held while anything computes.
        clock: seconds, monotonic.
    """

    def __init__(self, cores: threading.Lock, clock: Callable[[], float]) -> None:
        self._cores, self._clock = cores, clock
        self._failures: Counter[int] = Counter()

    def succeeded(self, rung: int) -> None:
        """A batch of this rung did not fail."""
        self._failures[rung] = 0

    def each(self, batch: Batch, failure: Exception, company: Company, ready: Sequence[int]) -> Iterator[Saved]:
        """What becomes of each request of a batch: those that can be answered first.

        Args:
            failure: what the batch failed with.
            company: that answers now; another than the batch's where it was changed meanwhile.
            ready: numbers of the rungs that can be asked, those first that the goal allows; the batch's own is asked
                before all, for its process may have died of another request, and then one more.
        """
        rungs = sorted(ready, key=lambda number: number != batch.rung)
        why = f"rung {batch.rung} failed on its batch: {failure}"
        poisonous: list[tuple[Ticket, dict[int, Exception]]] = []
        for ticket in batch.tickets:
            saved, failures = self._try(ticket, company, rungs, why)
            if saved is not None:
                yield saved
            else:
                poisonous.append((ticket, failures))
            for number, error in failures.items():
                if saved is not None or isinstance(error, StartError):  # it is not the rows
                    self._blame(company, number, error)
        for ticket, failures in poisonous:
            yield Saved(ticket, error=self._told(company, ticket, failures, failure))

    def _try(
        self, ticket: Ticket, company: Company, rungs: Sequence[int], why: str
    ) -> tuple[Saved | None, dict[int, Exception]]:
        """The answer of the first rung that gives one, if there is any; and on which it failed, and how.

        A rung whose files can't be trusted any longer is given up, and is none of those.
        """
        failures: dict[int, Exception] = {}
        for number in rungs:
            if company.residents[number].state != "ready" or company.residents.promise(number) < ticket.floor:
                continue  # it was given up meanwhile, or promises less than is asked for
            start = self._clock()
            try:
                answers = self._run(company, number, ticket.leaves)
                return Saved(ticket, number, answers, why, start, self._clock()), failures
            except BundleError as error:
                self._give_up(company, number, f"it could not be loaded again: {error}")
            except Exception as error:  # noqa: BLE001  whatever a backend raises: the next one is asked
                failures[number] = error
                if len(failures) == TRIES:
                    break
        return None, failures

    def _run(self, company: Company, number: int, leaves: Sequence[Array]) -> list[Array]:
        with self._cores:
            return company.run(number, leaves)

    def _blame(self, company: Company, number: int, failure: Exception) -> None:
        """A rung failed for a reason of its own; too often in a row, and it is given up."""
        self._failures[number] += 1
        if self._failures[number] >= FAILURES:
            self._give_up(company, number, f"it failed {FAILURES} times in a row: {failure}")

    def _give_up(self, company: Company, number: int, why: str) -> None:
        whose = {"bundle": str(company.residents.bundle.path), "rung": number, "reason": why}
        log.warning("given up", extra=whose)
        self._failures[number] = 0
        company.residents.turn_away(number, "failed", why)

    def _told(
        self, company: Company, ticket: Ticket, failures: Mapping[int, Exception], failure: Exception
    ) -> Exception:
        """The error of a request that no rung answers: with the rows that fail by themselves, where it has many.

        They are not looked for where each try would cost a process, or the rung has left the memory.

        Args:
            failures: of the rungs that were asked; `failure` of its batch.
        """
        if not company.residents.ready:
            return none_left(company)
        if not failures:
            return of_rows(failure)  # those that were ready have been given up, and others are only now
        number, failure = list(failures.items())[-1]
        signature = company.residents.bundle.signature
        size = signature.fixed_batch
        divisible = ticket.rows > 1 and (size is not None or joinable(signature))
        if not divisible or isinstance(failure, (LostError, GoneError)):
            return of_rows(failure)

        def run(rows: slice) -> None:
            self._run(company, number, filled([leaf[rows] for leaf in ticket.leaves], size))

        rows, whole, failure = search(run, ticket.rows, failure, self._clock)
        if rows:
            return of_rows(failure, f"{_named(rows, ticket.rows)}{'' if whole else ', and perhaps others'}: ")
        return of_rows(failure, f"none of its {ticket.rows} rows fails by itself, but together: " if whole else "")


def search(
    run: Callable[[slice], None], rows: int, failure: Exception, clock: Callable[[], float]
) -> tuple[list[int], bool, Exception]:
    """The rows, of so many that fail together, which fail by themselves.

    The rows are halved, and halves that fail halved again, the first ones first: 2 log2(rows) calls for one such row.

    Args:
        run: calls the model on a slice of the rows.
        failure: of all rows together.
        clock: seconds, monotonic.

    Returns:
        Numbers of the rows that fail, from 0; whether all were looked at, within `PROBES` calls and `PROBE_SECONDS`;
        and how the first of them fails, or `failure`.
    """
    found: list[int] = []
    first, until = failure, clock() + PROBE_SECONDS
    suspects = _halves(0, rows)
    for _ in range(PROBES):
        if not suspects or clock() > until:
            break
        start, end = suspects.pop()
        try:
            run(slice(start, end))
        except (LostError, GoneError, BundleError):
            suspects.append((start, end))
            break
        except Exception as error:  # noqa: BLE001  whatever a backend raises
            if end - start > 1:
                suspects += _halves(start, end)
            else:
                first = first if found else error
                found.append(start)
    return found, not suspects, first


def _halves(start: int, end: int) -> list[tuple[int, int]]:
    """The two halves, the first one last, which is taken first."""
    middle = (start + end) // 2
    return [(middle, end), (start, middle)]


def none_left(company: Company) -> ClosedError:
    """What is told to whoever asks a model whose rungs have all been given up."""
    reasons = "; ".join(f"rung {r.number} is {r.state}: {r.why}" for r in company.residents if r.why)
    return ClosedError(f"no rung of it is ready ({reasons}); load it again, once its bundle is whole")


def of_rows(failure: BaseException, where: str = "") -> RowsError:
    """What a backend raised, as an error of ours."""
    if isinstance(failure, RowsError):
        return failure if not where else RowsError(where + str(failure))
    return RowsError(f"{where}the model failed on it: {type(failure).__name__}: {failure}")


def _named(rows: Sequence[int], of: int) -> str:
    """Rows in words, counted from 1."""
    if len(rows) == of:
        return f"each of its {of} rows"
    shown = [str(row + 1) for row in rows[:NAMED]]
    if len(rows) > NAMED:
        shown.append(f"{len(rows) - NAMED} more")
    listed = " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
    return f"row{'s' if len(rows) > 1 else ''} {listed} of {of} (counted from 1)"
