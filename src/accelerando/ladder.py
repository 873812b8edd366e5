"""The ladder: verified recipes worth keeping, each next clearly faster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from accelerando.recipe import Artifact, Recipe
from accelerando.trial import Evidence, Trial


@dataclass(frozen=True)
class Rung:
    """A verified recipe worth keeping.  `certified` is False while its evidence is from the select split."""

    recipe: Recipe
    artifact: Artifact
    evidence: Evidence
    certified: bool = False


@dataclass(frozen=True)
class Ladder:
    """Rungs from the slowest, the original, to the fastest."""

    rungs: tuple[Rung, ...]

    @classmethod
    def climb(cls, trials: Iterable[Trial]) -> Ladder:
        raise NotImplementedError
