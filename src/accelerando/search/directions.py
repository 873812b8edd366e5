"""Directions in which a model may be cut: how much of the cut each technique of the stage SHAPE takes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from accelerando.recipe import Stage, Technique
from accelerando.search.belief import share_of

LARGER = ("width", "depth")  # the knobs of a technique that makes a model larger: times, above 1
FAINT = 0.15  # what takes on less than this share of a cut is left out of it

Direction = Mapping[str, float]  # by name of technique: its share of the cut, in logarithms; they sum to 1


def depth_of(step: Technique) -> float:
    """How deep a technique cuts: minus the logarithm of what it leaves."""
    share = share_of(step)
    return 0.0 if share is None else -math.log1p(-share)


def grows(front: Sequence[Technique]) -> bool:
    """Whether a step of a front takes nothing away but adds."""
    return any(s.stage is Stage.SHAPE and s.knobs.keys() >= set(LARGER) for s in front)


def direction_of(front: Sequence[Technique]) -> Direction:
    """How the cuts of a front were divided among the techniques."""
    depths: dict[str, float] = {}
    for step in front:
        if found := depth_of(step):
            depths[step.name] = depths.get(step.name, 0.0) + found
    whole = sum(depths.values())
    return {name: part / whole for name, part in depths.items()}


def mixtures(names: Sequence[str], known: Sequence[tuple[Direction, float]], count: int) -> list[Direction]:
    """Mixtures of techniques that Optuna's tree-structured Parzen estimator proposes, from how former ones healed."""
    if len(names) < 2:
        return []
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
    sampler = optuna.samplers.TPESampler(seed=len(known), n_startup_trials=4)
    study = optuna.create_study(sampler=sampler)
    for direction, value in known:
        weights = {name: direction.get(name, 0.0) for name in names}
        study.add_trial(optuna.trial.create_trial(params=weights, distributions=dict(kinds), value=value))
    found: list[Direction] = []
    for _ in range(count):
        weights = study.ask(dict(kinds)).params
        whole = sum(weights.values()) or 1.0
        kept = {n: w for n, w in weights.items() if w / whole >= FAINT}
        found.append({n: w / sum(kept.values()) for n, w in kept.items()})
    return found
