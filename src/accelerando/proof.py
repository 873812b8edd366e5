"""What `Bundle.verify` looks at: files, figures, verdict, and whether every rung still answers as it did."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerando import manifest as law
from accelerando.errors import BundleError, MissingExtraError, ModelError, RefusalError
from accelerando.goal import Outcome
from accelerando.ladder import Rung
from accelerando.machine import Machine
from accelerando.parity import Parity

if TYPE_CHECKING:
    from accelerando.bundle import Bundle

# What no random resampling touches: other versions of numpy may draw otherwise.
REPEATABLE = ("split", "batch", "metric", "speedup", "latency_seconds", "throughput_per_second")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `passed` is None where it could not be looked at here, and `detail` says why; `code` is that of `docs/format.md`
    where it failed.
    """

    subject: str
    passed: bool | None
    code: str = ""
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is wrong, as far as it could be looked at here."""
        return self.passed is not False

    def __str__(self) -> str:
        word = {True: "passed", False: "FAILED", None: "not looked at"}[self.passed]
        return f"{word}: {self.subject}" + (f": {self.detail}" if self.detail else "")


def findings(bundle: Bundle, model: Any) -> Iterator[Finding]:
    """Everything there is to look at, one after the other; loads each rung in this process."""
    yield _verdict(bundle)
    parity: Parity | None = None
    try:
        parity = bundle.parity
        yield Finding("parity", True if parity else None, detail="" if parity else "no rows were stored")
    except BundleError as error:
        yield Finding("parity", False, error.code, str(error))
    for i, rung in enumerate(bundle.ladder.rungs):
        subject = f"rung {i}, {rung.recipe}"
        try:
            bundle.check_rung(rung)
            _check_summary(bundle, i)
            yield Finding(f"{subject}: files and figures", True)
            if parity:
                _check_answers(bundle, rung, parity, model)
                yield Finding(f"{subject}: answers", True)
        except (MissingExtraError, ModelError, RefusalError) as error:
            yield Finding(f"{subject}: answers", None, detail=str(error))
        except BundleError as error:
            yield Finding(subject, False, error.code, str(error))


def _verdict(bundle: Bundle) -> Finding:
    """The verdict, judged again.

    Near a bound the bootstrap may fall otherwise elsewhere, so only a "met" that is now "not met", or the reverse,
    is a failure.
    """
    now = bundle.goal.judge(bundle.ladder.rungs[bundle.best].evidence).outcome
    said = bundle.verdict.outcome
    if {now, said} == {Outcome.MET, Outcome.NOT_MET}:
        return Finding("verdict", False, "verdict", f"it says {said.value}, but the evidence says {now.value}")
    return Finding("verdict", True)


def _check_summary(bundle: Bundle, number: int) -> None:
    """Raises BundleError `summary` where the figures for readers are not those of the evidence."""
    now, said = law.finite(bundle.ladder.rungs[number].evidence.summary()), bundle.summaries[number]
    for name in REPEATABLE:
        if not _close(now[name], said.get(name)):
            raise BundleError("summary", f"rung {number} says {name} {said.get(name)}, its evidence {now[name]}")


def _check_answers(bundle: Bundle, rung: Rung, parity: Parity, model: Any) -> None:
    """Raises BundleError `differs` where a rung answers otherwise than when it was stored."""
    stored = parity.rungs.get(rung.recipe.key)
    if stored is None or len(stored) != len(parity.original) or len(parity.inputs) != len(bundle.signature.inputs):
        raise BundleError("parity", f"no answers of {rung.recipe} were stored, or not for its inputs")
    runner = bundle.start(rung, model)
    at_home = Machine.look().key == bundle.machine.key
    try:
        if wrong := parity.deviation(rung.recipe.key, runner(list(parity.inputs)), at_home):
            raise BundleError("differs", f"{rung.recipe}: {wrong}")
    except (BundleError, RefusalError):
        raise
    except Exception as error:
        raise BundleError("load", f"{rung.recipe} fails on the stored rows: {error}") from error
    finally:
        runner.close()


def _close(a: Any, b: Any) -> bool:
    """Whether plain values are the same, numbers to six digits."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)
