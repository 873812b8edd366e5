"""One recipe of ours, without a search, against single tools on the same model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.interval import Interval, median_interval
from accelerando.measure.arm import Arm, Subject, save_samples
from accelerando.recipe import Recipe
from accelerando.signature import Array, Port, Signature
from accelerando.workload import Chunk, Form, Model, Samples
from benchmarks.peers import Peer, contest
from benchmarks.results import table


@dataclass(frozen=True)
class Line:
    """How a contestant did: seconds per call, ours over it, and how far its answers are from the exact ones."""

    name: str
    seconds: float
    ours_over_it: Interval
    off: float


def plain_model(module: Any, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Model:
    """A module of one float32 input and output, by their shapes without the batch; it is not run."""
    ports = (Port("x", "float32", ("batch", *inputs)),), (Port("y", "float32", ("batch", *outputs)),)
    return Model(Form.TORCH, module, Signature(*ports, ("x",), 1, {"x": {"leaf": 0}}, {"leaf": 0}))


def normal_rows(count: int, *shape: int) -> Samples:
    x = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    return Samples((Chunk((x,), None),))


def compare(model: Model, recipe: Recipe, rows: Samples, exact: Array, tools: Sequence[str], rounds: int) -> list[Line]:
    """Build a recipe, and let it take turns with the tools at batch 1; ours comes first.

    Args:
        exact: the model's answers to the rows.
    """
    peers = [Peer(name, model, rows, rows, 1) for name in tools]
    with tempfile.TemporaryDirectory() as folder:
        made = built(model, recipe, rows, Path(folder))
        save_samples(rows, Path(folder) / "rows")
        compiled = _new(Path(folder, "compiled"))
        subject = Subject(recipe, recipe.backend.compile(made, compiled), compiled)
        with Arm(subject, model.signature, Path(folder), "rows", 1) as ours:
            seen = contest(peers, ours, rounds)
            answers = {"ours": ours.answers(rows.chunks[0].inputs, 120.0, 120.0, 2**30)[0]}
    for peer in peers:
        answers[peer.name] = peer.outputs(rows, model.signature)
        peer.close()
    scale = float(np.abs(exact).max())
    return [
        Line(
            name,
            float(np.median(seen[name])),
            median_interval(seen[name] / seen["ours"]),
            float(np.abs(answers[name] - exact).max()) / scale,
        )
        for name in ("ours", *tools)
    ]


def built(model: Model, recipe: Recipe, rows: Samples, folder: Path) -> Model:
    """The model after the recipe's techniques."""
    for i, step in enumerate(recipe.steps):
        model = step.apply(model, rows, _new(folder / str(i)))
    return model


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def lines_table(lines: Sequence[Line]) -> str:
    return table(
        ["contestant", "p50", "ours over it", "off by, of the largest answer"],
        [[x.name, f"{x.seconds * 1e3:,.3g} ms", str_of(x.ours_over_it), f"{x.off:.1e}"] for x in lines],
    )


def str_of(interval: Interval) -> str:
    return f"{interval.mid:.2f} ({interval.low:.2f} to {interval.high:.2f})"
