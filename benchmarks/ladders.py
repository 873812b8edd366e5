"""A ladder to stand on: the ViT on MNIST with rungs of several speeds, each built, healed, measured and certified."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.adoption import adopt
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.goal import Goal
from accelerando.machine import Machine
from accelerando.plugins import find
from accelerando.recipe import Recipe, Technique
from accelerando.search.budget import Budget
from accelerando.search.grounds import attempt
from accelerando.search.history import Proposal
from accelerando.search.site import Site
from accelerando.search.space import original_recipe
from accelerando.serve.governed import GovernedModel, govern
from accelerando.serve.governor import Decides
from accelerando.techniques.distil import Distil
from accelerando.techniques.drop_layers import DropLayers
from accelerando.techniques.export_onnx import ExportOnnx
from accelerando.techniques.prune_channels import PruneChannels
from accelerando.techniques.quantize_dynamic import QuantizeDynamic
from benchmarks.cases import CASES

ONE = Onnxruntime(threads=1, batch=1)  # one core computes, the other is left to who sends
# What is cut, and for how many seconds it is healed: too short to be as good as the original, or one rung would do.
SHAPES: tuple[tuple[tuple[Technique, ...], int], ...] = (
    ((), 0),
    ((DropLayers(0.34),), 12),
    ((DropLayers(0.5),), 10),
    ((DropLayers(0.67),), 10),
    ((DropLayers(0.67), PruneChannels(0.5)), 8),
    ((DropLayers(0.83),), 8),
    ((DropLayers(0.83), PruneChannels(0.5)), 8),
    ((DropLayers(0.83), PruneChannels(0.75)), 6),
)


@dataclass(frozen=True)
class Ground:
    """Where the parts of a benchmark stand: the bundle's folder, its original module, and rows with their labels."""

    path: Path
    model: Any
    x: np.ndarray
    y: np.ndarray

    @classmethod
    def prepared(cls) -> Ground:
        """The ladder, built unless it is there already."""
        case = CASES["vit-heal"]()
        x, y = case.data
        return cls(vit_ladder(), case.model, np.asarray(x, np.float32), np.asarray(y))

    def crowds(self, rows: int, count: int) -> np.ndarray:
        """So many requests of so many rows each, (count, rows, ...)."""
        chosen = np.random.default_rng(0).permutation(np.arange(count * rows) % len(self.x))
        return np.asarray(self.x[chosen.reshape(count, rows)])

    def opened(self, goal: str, policy: Decides | str = "balanced", audit: float = 0.0) -> GovernedModel:
        """The bundle with all its rungs loaded, in this process."""
        return opened(self.path, goal, policy, audit, self.model)


def opened(path: Path, goal: str, policy: Decides | str, audit: float, model: Any) -> GovernedModel:
    """A bundle with all its rungs loaded, in this process; the first one runs the original module, on one core too."""
    import torch

    torch.set_num_threads(1)
    found = govern(path, goal=goal, governor=policy, audit=audit, model=model)
    until = time.monotonic() + 60
    while any(r.state in ("out", "loading") for r in found.status().rungs) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def vit_ladder() -> Path:
    """The bundle's folder; it is kept in ACCELERANDO_BENCH_FOLDER where that is set."""
    folder = Path(os.environ.get("ACCELERANDO_BENCH_FOLDER", tempfile.mkdtemp())) / "vit-ladder"
    if (folder / "manifest.json").exists():
        return Bundle.open(folder).path
    case = CASES["vit-heal"]()
    workload = adopt(case.model, case.data, train=case.train, metric=case.metric)
    original = original_recipe(workload.model, {"eager": find("backends", "eager")})
    recipes = [original]
    for shape, seconds in SHAPES:
        lessons = (Distil(seconds=seconds),) if seconds else ()
        recipes.append(Recipe((*shape, *lessons, ExportOnnx(), QuantizeDynamic()), ONE))
    goal = Goal.parse("drop <= 50%")
    with Site(folder, workload, Machine.look(), goal, Budget(900), original) as site:
        history = site.history()
        for recipe in recipes:
            history = site.note(history, attempt(Proposal(recipe, "a rung"), site.grounds, history, 300))
        return site.finish(history, lambda recipe, doing: None).path
