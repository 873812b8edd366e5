"""How soon the quality watch finds a rung that went bad, simulated with its own promise and its own interval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from accelerando.interval import CONFIDENCE
from accelerando.serve.anytime import ConfidenceSequence, least_mean
from accelerando.serve.likeness import MANY_ROWS
from benchmarks.results import record, table

AGREES = 0.99  # of its answers are the best rung's, as it was certified; of the others each is right in half
LOSSES = (0.05, 0.10, 0.20)  # of that agreement
SETTINGS = ((0.99, 500), (0.99, 5000), (0.97, 500), (0.97, 5000), (0.90, 500), (0.90, 5000), (0.75, 5000))
STORED = (8, 30, 100, 250, 500, 1024)
LIVES, LONGEST, STEP = 200, 4000, 10  # rungs, audited requests of each, and how often it is looked at
MISS = (1 - CONFIDENCE) / 2


def run(name: str) -> None:
    losses = [f"loses {loss * 100:.0f} points" for loss in LOSSES]
    scores = [[f"{r:.0%}", f"{n}", *_cells(promise_of_scores(r, n))] for r, n in SETTINGS]
    stored = [[f"{n}", *_cells(promise_of_answers(n))] for n in STORED]
    body = (
        f"Simulated, not measured: a rung that agrees with the best in {AGREES:.0%}, and then in so many points less; "
        "a right-or-wrong metric, requests of one row, a certificate as it is in the middle. Each cell: audited "
        f"requests until quarantine, the median of {LIVES} lives (nine in ten are below the second number); never: "
        "what is left is no less than what is promised.\n\nBy the scores alone:\n\n"
        f"{table(['original right', 'samples', 'promise', *losses], scores)}\n\n"
        "By stored answers, however often they are right:\n\n"
        f"{table(['stored answers', 'promise', *losses], stored)}"
    )
    record(name, "How soon the quality watch finds a bad rung, simulated", body)


def promise_of_scores(right: float, samples: int) -> float:
    """The least agreement that the scores promise: both are right in so many."""
    return least_mean(_values(right - (1 - AGREES) / 2, samples), MISS)


def promise_of_answers(stored: int) -> float:
    """The least agreement that stored answers promise; many are asked beside the scores, and share their miss."""
    return least_mean(_values(AGREES, stored), MISS / 2 if stored >= MANY_ROWS else MISS)


def _values(share: float, count: int) -> Sequence[float]:
    return [1.0] * round(share * count) + [0.0] * (count - round(share * count))


def _cells(promise: float) -> list[str]:
    return [f"{promise:.1%}", *(_cell(promise, AGREES - loss) for loss in LOSSES)]


@cache
def _cell(promise: float, agreement: float) -> str:
    if agreement >= promise:
        return "never"
    found = np.array([life(promise, agreement, seed) for seed in range(LIVES)])
    middle, most = (float(np.quantile(found, q, method="higher")) for q in (0.5, 0.9))
    if middle > LONGEST:
        return f"over {LONGEST}"
    return f"{middle:.0f} ({f'{most:.0f}' if most <= LONGEST else f'over {LONGEST}'})"


def life(promise: float, agreement: float, seed: int) -> float:
    """Audited requests until a rung that agrees so often is quarantined; infinite where it lives longer."""
    sequence = ConfidenceSequence()
    for count, alike in enumerate(np.random.default_rng(seed).random(LONGEST) < agreement, 1):
        sequence.observe(float(alike))
        if count % STEP == 0 and sequence.below(promise):
            return float(count)
    return float("inf")
