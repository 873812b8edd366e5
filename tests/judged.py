"""Trials whose answers are known sample by sample."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from accelerando.errors import Reason
from accelerando.recipe import Recipe
from accelerando.testing.fakes import fake_artifact, fake_evidence
from accelerando.trial import Refused, Trial, Verified

ROWS = 4000


def known(
    recipe: Recipe, speedup: float, right: np.ndarray, original: np.ndarray, refused: Reason | None = None
) -> Trial:
    """A trial of a recipe that was right on `right` (n,) of the samples, and the original on `original` (n,)."""
    made = fake_evidence(speedup, n=ROWS)
    evidence = replace(made, scores=right[:, None].astype(float), original_scores=original[:, None].astype(float))
    if refused:
        return Trial(recipe, Refused(refused, "", None, evidence, evidence.speedup), 1.0)
    return Trial(recipe, Verified(fake_artifact(), evidence), 1.0)
