"""What trials teach about recipes that were not tried: Bayesian linear regression on the parts of a recipe.

The logarithm of the speedup is taken as a sum over parts: the backend, each technique, each knob, and how they go
together.  One measured recipe so moves the belief about all that share a part with it: int8 that was slow on one
backend is expected to be slow at its other thread counts, and less so on another backend.  The drop in quality is
believed likewise.  (Bishop, *Pattern Recognition and Machine Learning*, section 3.3.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from accelerando.interval import Floats
from accelerando.recipe import Plugin, Recipe, Stage, Technique


@dataclass(frozen=True)
class Prior:
    """Mean and standard deviation of a part's effect before anything was measured."""

    mean: float
    deviation: float


# In log speedup.  Compiling usually helps, by how much is open, and compilers differ less from each other than all
# do from the original; how wide a backend works (threads, batch, streams) changes more than any other knob.
WIDTHS = frozenset({"threads", "batch", "streams"})
SPEED = {
    "compiled": Prior(0.6, 0.8), "backend": Prior(0.0, 0.4), "own": Prior(0.0, 0.2), "exact": Prior(0.0, 0.1),
    "shape": Prior(0.6, 0.3), "lesson": Prior(0.0, 0.02), "step": Prior(0.15, 0.4), "pair": Prior(0.0, 0.35),
    "width": Prior(0.0, 0.3), "knob": Prior(0.0, 0.1), "knob pair": Prior(0.0, 0.12),
}  # fmt: skip
# In relative drop.  Exact steps lose nothing; what a knob adds or takes is small.
EXACT = Prior(0.0, 0.0005)
DROP = {
    "compiled": EXACT, "backend": EXACT, "own": EXACT, "exact": EXACT, "shape": Prior(0.0, 0.1),
    "lesson": Prior(0.0, 0.02), "step": Prior(0.004, 0.02), "pair": Prior(0.0, 0.005), "width": EXACT,
    "knob": Prior(0.0, 0.004), "knob pair": Prior(0.0, 0.001),
}  # fmt: skip


Part = tuple[str, str, float]  # kind, name, and how often it counts


def parts(recipe: Recipe) -> tuple[Part, ...]:
    """A recipe's parts.  A cut counts by how much it leaves: halving twice is believed to gain twice as much, in
    logarithms, as halving once."""
    backend = recipe.backend
    found: list[Part] = []

    def add(kind: str, name: str, times: float = 1.0) -> None:
        found.append((kind, name, times))

    for kind in ("compiled", "backend") if backend.portable else ("own",):
        add(kind, backend.name if kind != "compiled" else kind)
    for k, v in changed(backend):
        add("width" if k in WIDTHS else "knob", f"{backend.name}.{k}={v}")
    for step in recipe.steps:
        if (share := share_of(step)) is not None:
            add("shape", step.name, -math.log1p(-share))
            continue
        if step.stage is Stage.HEAL:
            add("lesson", step.name)
            continue
        add("exact" if step.exact else "step", step.name)
        for k, v in changed(step):
            add("knob", f"{step.name}.{k}={v}")
        if step.stage >= Stage.QUANTIZE:
            add("pair", f"{step.name}+{backend.name}")
            for k, v in changed(backend):
                add("knob pair", f"{step.name}+{backend.name}.{k}={v}")
    return tuple(found)


def share_of(step: Technique) -> float | None:
    """The share that a technique of the stage SHAPE takes away; None for all others, and for one that adds."""
    share = getattr(step, "share", None) if step.stage is Stage.SHAPE else None
    return None if share is None else float(share)


def changed(plugin: Plugin) -> list[tuple[str, object]]:
    """The knobs that are not at their defaults."""
    plain = type(plugin)().knobs
    return [(k, v) for k, v in plugin.knobs.items() if v != plain[k]]


@dataclass(frozen=True)
class Belief:
    """A normal belief about a figure of every recipe.

    Args:
        names: parts, in the order of the columns.
        mean: (p,), covariance: (p, p) of the parts' effects.
        priors: for parts that no measurement has touched.
    """

    names: dict[str, int]
    mean: Floats
    covariance: Floats
    priors: dict[str, Prior]

    @classmethod
    def learn(cls, seen: Iterable[tuple[Recipe, float, float]], priors: dict[str, Prior]) -> Belief:
        """From (recipe, figure, standard error of the figure)."""
        rows = [(parts(recipe), figure, max(error, 1e-6)) for recipe, figure, error in seen]
        kinds = {name: kind for found, _, _ in rows for kind, name, _ in found}
        names = {name: i for i, name in enumerate(sorted(kinds))}
        mean = np.array([priors[kinds[n]].mean for n in names])
        deviation = np.array([priors[kinds[n]].deviation for n in names])
        if not rows:
            return cls({}, np.zeros(0), np.zeros((0, 0)), priors)
        design = np.zeros((len(rows), len(names)))
        for i, (found, _, _) in enumerate(rows):
            for _, name, times in found:
                design[i, names[name]] += times
        weight = 1 / np.array([error for _, _, error in rows]) ** 2
        precision = np.diag(1 / deviation**2) + design.T @ (weight[:, None] * design)
        covariance: Floats = np.linalg.inv(precision).astype(np.float64)
        figures = np.array([figure for _, figure, _ in rows])
        mean = covariance @ (mean / deviation**2 + design.T @ (weight * figures))
        return cls(names, mean, covariance, priors)

    def about(self, recipe: Recipe) -> tuple[float, float]:
        """Mean and standard deviation of the figure of a recipe."""
        mean, variance, row = 0.0, 0.0, np.zeros(len(self.names))
        for kind, name, times in parts(recipe):
            if name in self.names:
                row[self.names[name]] += times
            else:
                mean += times * self.priors[kind].mean
                variance += (times * self.priors[kind].deviation) ** 2
        mean += float(row @ self.mean)
        variance += float(row @ self.covariance @ row)
        return mean, math.sqrt(max(variance, 1e-12))

    def effect(self, kind: str, name: str) -> float:
        """The mean effect of one part, counted once."""
        return float(self.mean[self.names[name]]) if name in self.names else self.priors[kind].mean


def expected_gain(mean: float, deviation: float, best: float) -> float:
    """E[max(0, figure - best)] of a normal figure (Mockus 1975; Jones et al. 1998, equation 15)."""
    z = (mean - best) / deviation
    return (mean - best) * probability(z) + deviation * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def probability(z: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-z / math.sqrt(2))


def spread(values: Sequence[float]) -> float:
    """The standard error that an interval's width stands for."""
    return (values[-1] - values[0]) / 3.92
