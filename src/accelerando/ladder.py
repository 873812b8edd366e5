"""The ladder: verified recipes worth keeping, each next clearly faster.

A plain Pareto front keeps neighbours that differ by noise.  Here two rungs never overlap in speed, a noisy rung
counts for what it is sure of (the low end of its interval), and a slower rung stays only where its quality is
better by more than half of what the samples can tell apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from accelerando.interval import Interval
from accelerando.recipe import Artifact, Recipe
from accelerando.trial import Evidence, Trial

NEGLIGIBLE = 0.5  # of the wider drop's half width: a smaller gain in quality does not keep a slower rung
Merit = TypeVar("Merit", float, tuple[float, ...])


@dataclass(frozen=True)
class Rung:
    """A verified recipe worth keeping.  `certified` is False while its evidence is from the select split."""

    recipe: Recipe
    artifact: Artifact
    evidence: Evidence
    certified: bool = False

    @property
    def speedup(self) -> Interval:
        """Times faster than the original."""
        return self.evidence.speedup

    @property
    def drop(self) -> Interval:
        """How much worse than the original, in the metric's own unit; negative where better."""
        return self.evidence.drop

    @property
    def quality(self) -> Interval:
        """The metric's value."""
        return self.evidence.quality

    def better_than(self, other: Rung) -> bool:
        """Whether its quality is better by more than noise; where a is better than b and b than c, a is than c."""
        mine, theirs = self.evidence.drop, other.evidence.drop
        margin = NEGLIGIBLE * max(mine.high - mine.low, theirs.high - theirs.low) / 2
        return theirs.mid - mine.mid > margin

    def clearly_faster_than(self, other: Rung) -> bool:
        return self.evidence.clearly_faster_than(other.evidence)


@dataclass(frozen=True)
class Ladder:
    """Rungs from the slowest, the original, to the fastest.

    Every rung is clearly faster than the one below it.
    """

    rungs: tuple[Rung, ...]

    @classmethod
    def climb(cls, trials: Iterable[Trial], original: Recipe, keep: Recipe | None = None) -> Ladder:
        """The ladder of all verified trials.

        Args:
            original: the recipe of rung 0, which must be among the trials.
            keep: a recipe that must be a rung if it is clearly faster than the original, such as the best one under
                the goal; what does not differ from it by more than noise gives way.

        Raises:
            ValueError: the original was not verified.
        """
        rungs = [Rung(t.recipe, t.verified.artifact, t.verified.evidence) for t in trials if t.verified]
        return cls.of(rungs, original, keep)

    @classmethod
    def of(cls, rungs: Iterable[Rung], original: Recipe | None = None, keep: Recipe | None = None) -> Ladder:
        """The ladder of rungs in any order; without `original`, the first of them is the original.

        Of several rungs with one recipe, the one that was measured best counts.

        Raises:
            ValueError: there is no rung of the original.
        """
        rungs = list(rungs)
        best = _best_measured(rungs)
        base_key = original.key if original else rungs[0].recipe.key if rungs else None
        if base_key is None or base_key not in best:
            raise ValueError(
                f"a ladder begins with the original, but {original or 'it'} is not among {len(rungs)} "
                "verified recipes; measure the original first"
            )
        base = best.pop(base_key)
        faster = [r for r in best.values() if r.clearly_faster_than(base)]
        return cls((base, *reversed(_positions(faster, best.get(keep.key) if keep else None))))

    @property
    def original(self) -> Rung:
        return self.rungs[0]

    @property
    def fastest(self) -> Rung:
        return self.rungs[-1]

    def best(self, merit: Callable[[Evidence], Merit]) -> int:
        """The number of the rung with the greatest merit (`goal.merit`); of equal ones the slowest."""
        return max(range(len(self.rungs)), key=lambda i: merit(self.rungs[i].evidence))

    def index(self, recipe: Recipe) -> int | None:
        """The number of a recipe's rung, or None where it has none."""
        keys = [r.recipe.key for r in self.rungs]
        return keys.index(recipe.key) if recipe.key in keys else None

    def __len__(self) -> int:
        return len(self.rungs)

    def __iter__(self) -> Iterator[Rung]:
        return iter(self.rungs)

    def __getitem__(self, number: int) -> Rung:
        return self.rungs[number]


def _best_measured(rungs: Iterable[Rung]) -> dict[str, Rung]:
    """By recipe, the rung that is certified, has the most rounds, then samples; then the one that claims least."""

    def trust(rung: Rung) -> tuple[float, ...]:
        found = rung.evidence
        seen = (len(found.rounds), len(found.scores), len(found.seconds))
        return (rung.certified, *seen, -found.speedup.low, -found.speedup.mid, found.drop.mid, found.drop.high)

    best: dict[str, Rung] = {}
    for rung in rungs:
        key = rung.recipe.key
        if key not in best or trust(rung) > trust(best[key]):
            best[key] = rung
    return best


def _positions(rungs: Iterable[Rung], keep: Rung | None) -> list[Rung]:
    """From the fastest down: a position for each speed that can be told apart and brings better quality.

    Among rungs as fast as the fastest of their position, the one of better quality takes it.  All are compared with
    that fastest one, so that a position can't drift down by many small steps.
    """

    def order(rung: Rung) -> tuple[float, float, str]:
        return (-rung.evidence.speedup.low, rung.evidence.drop.mid, rung.recipe.key)

    held: list[Rung] = []
    least_speed = 0.0  # what the fastest of the last position is sure of
    for rung in sorted(rungs, key=order):
        if keep is not None and rung.recipe.key == keep.recipe.key:
            while held and not held[-1].clearly_faster_than(rung):
                held.pop()
            held.append(rung)
            least_speed = rung.evidence.speedup.low
        elif not held or (held[-1].clearly_faster_than(rung) and rung.better_than(held[-1])):
            held.append(rung)
            least_speed = rung.evidence.speedup.low
        elif (
            held[-1] is not keep
            and rung.evidence.speedup.mid >= least_speed
            and rung.better_than(held[-1])
            and all(above.clearly_faster_than(rung) for above in held[-2:-1])
        ):
            held[-1] = rung
    return held
