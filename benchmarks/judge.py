"""How often the judge errs, for real: two arms of the same files, a planted slowdown, and a planted loss.

The arms compute hyperbolic tangents in processes of their own, as every duel does; each duel has fresh processes, so
what luck a process has with its memory is in the figure.  One thread each: here the judge is on trial, and not what
threads of a matrix product do when they must wait for a core.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from accelerando.interval import paired_bootstrap
from accelerando.machine import Machine
from accelerando.measure.child import Child
from accelerando.measure.clock import settle_on, time_block
from accelerando.measure.rounds import CERTIFY, SELECT, Effort, Rounds, duel
from accelerando.search.certificate import PROCESSES
from benchmarks.results import record, table

DUELS = int(os.environ.get("ACCELERANDO_BENCH_DUELS", "200"))
_work: list[Any] = []


def _prepare(size: int, slower: float) -> None:
    import time

    numbers = np.random.default_rng(0).standard_normal(size)

    def answer(leaves: Any) -> Any:
        start = time.perf_counter_ns()
        out = np.tanh(numbers)
        end = start + (time.perf_counter_ns() - start) * slower
        while time.perf_counter_ns() < end:
            pass
        return [out]

    _work.append(answer)


def _block(seconds: float, core: int) -> np.ndarray:
    settle_on(core)
    return time_block(_work[0], [()], seconds)


@dataclass
class Arm:
    child: Child

    @classmethod
    def of(cls, slower: float, size: int = 30_000) -> Arm:
        child = Child("an arm")
        child.call(_prepare, size, slower)
        return cls(child)

    @property
    def pid(self) -> int:
        return self.child.pid

    def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
        return self.child.call(_block, seconds, core, timeout=timeout)

    def typical(self, block: np.ndarray) -> float:
        return float(np.median(block))


def duels(count: int, slower: float, effort: Effort = SELECT, pairs: int = 1) -> list[Any]:
    """The speedup's interval of `count` verdicts, each from so many pairs of fresh processes."""
    cores, found = Machine.look().cores, []
    for seed in range(count):
        rounds = []
        for pair in range(pairs):
            candidate, original = Arm.of(slower), Arm.of(1.0)
            rounds.append(duel(candidate, original, effort, cores=cores, seed=seed * pairs + pair))
            candidate.child.close()
            original.child.close()
        together = {f.name: np.concatenate([getattr(r, f.name) for r in rounds]) for f in fields(Rounds)}
        found.append(Rounds(**together).speedup)
    return found


def losses(count: int, rows: int = 6000, base: float = 0.95, loss: float = 0.01, churn: float = 0.015) -> float:
    """The share of `count` candidates, one point worse on `rows` samples, whose drop is seen to be above 0.

    Besides the loss, `churn` of the answers turn from right to wrong, and as many from wrong to right.
    """
    seen = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        original = (rng.random(rows) < base).astype(float)
        flip = rng.random(rows)
        ours = np.where(original == 1, flip >= (churn + loss) / base, flip < churn / (1 - base)).astype(float)
        drop = paired_bootstrap(ours[:, None], original[:, None], lambda a, b: (b - a)[..., 0], seed=seed)
        seen += drop.low > 0
    return seen / count


def run(name: str) -> None:
    each = replace(CERTIFY, least=CERTIFY.least // PROCESSES, most=CERTIFY.most // PROCESSES)
    rows, told = [], []
    for what, effort, pairs in (("the search's", SELECT, 1), ("a certificate's", each, PROCESSES)):
        equal, slow = duels(DUELS, 1.0, effort, pairs), duels(DUELS // 2, 1.05, effort, pairs)
        false, seen = sum(s.low > 1 for s in equal), sum(s.high < 1 for s in slow)
        good, bound = false <= 0.05 * len(equal), seen >= 0.95 * len(slow)
        rows.append([f"{what} verdict: equals called faster", f"{false} of {len(equal)}", "at most 5 %", _met(good)])
        rows.append([f"{what} verdict: a slowdown of 5 % seen", f"{seen} of {len(slow)}", "at least 95 %", _met(bound)])
        mids = np.array([s.mid for s in equal])
        told.append(
            f"Of {what} verdicts on equal arms the median is {np.median(mids):.4f}, the standard deviation "
            f"{mids.std():.4f}; half the interval's width is {np.median([(s.high - s.low) / 2 for s in equal]):.4f}."
        )
    lost = losses(400)
    rows.append(["a loss of one point seen (6,000 samples)", f"{lost:.1%} of 400", "at least 95 %", _met(lost >= 0.95)])
    told.append(
        f"The search's verdict is one pair of processes, which differ by luck; what is printed is the certificate's, "
        f"{PROCESSES} pairs."
    )
    record(name, "The judge", table(["what", "measured", "asked for", ""], rows) + "\n\n" + " ".join(told))


def _met(good: bool) -> str:
    return "reached" if good else "not reached"
