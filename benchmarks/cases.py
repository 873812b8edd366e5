"""Each case: our search within six minutes, then a contest of its best rung with every single tool.

Two cases need the folder `cases` with the trained models, which is not part of the project: put the folder above it
into ACCELERANDO_CASES (by default `../shared`).
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando import accelerate
from accelerando.adoption import adopt
from accelerando.bundle import Bundle
from accelerando.measure.arm import Arm, Subject, save_samples
from accelerando.metric import Metric
from accelerando.report.progress import Progress
from accelerando.trial import Trial
from benchmarks.peers import contest, prepare, standing
from benchmarks.results import record, table

BUDGET = os.environ.get("ACCELERANDO_BENCH_BUDGET", "6min")
ROUNDS = 40


@dataclass(frozen=True)
class Case:
    title: str
    model: Any
    data: Any
    train: Any
    metric: str
    batch: int = 1
    judged: int = 10_000


def shared(name: str) -> Any:
    folder = os.environ.get("ACCELERANDO_CASES", str(Path(__file__).parents[2] / "shared"))
    if not Path(folder, "cases").is_dir():
        sys.exit(f"{folder} holds no folder `cases`; name the folder above it in ACCELERANDO_CASES")
    sys.path.insert(0, folder)
    return getattr(__import__(f"cases.{name}"), name).build()


def trained(name: str, title: str) -> Callable[[], Case]:
    def build() -> Case:
        case = shared(name)
        return Case(title, case.model, case.test, tuple(a[:2000] for a in shuffled(case.train)), case.metric)

    return build


def shuffled(rows: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    order = np.random.default_rng(0).permutation(len(rows[0]))
    return tuple(a[order] for a in rows)


def text(batch: int) -> Callable[[], Case]:
    """A BERT-like classifier of 4 layers, width 256, 128 tokens, with random weights: fidelity is the metric."""

    def build() -> Case:
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=5000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
        )
        model = BertForSequenceClassification(config).eval()
        rng = np.random.default_rng(0)
        inputs = {"input_ids": rng.integers(5, 5000, (600, 128)), "attention_mask": np.ones((600, 128), np.int64)}
        return Case(f"A transformer text classifier, batch {batch}", model, inputs, None, "cosine", batch)

    return build


def lstm(batch: int) -> Callable[[], Case]:
    """Two LSTM layers of width 128 over 64 steps of 32 features, with random weights: fidelity is the metric."""

    def build() -> Case:
        import torch

        torch.manual_seed(0)

        class Lstm(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rnn = torch.nn.LSTM(32, 128, 2, batch_first=True)
                self.head = torch.nn.Linear(128, 10)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.rnn(x)[0][:, -1])

        rows = np.random.default_rng(0).standard_normal((1500, 64, 32)).astype(np.float32)
        return Case(f"An LSTM, batch {batch}", Lstm().eval(), rows, None, "cosine", batch)

    return build


CASES: dict[str, Callable[[], Case]] = {
    "vit": trained("vit_mnist", "ViT on MNIST, batch 1"),
    "resnet": trained("resnet_cifar10", "ResNet-56 on CIFAR-10, batch 1"),
    "text-1": text(1), "text-32": text(32), "lstm-1": lstm(1), "lstm-32": lstm(32),
}  # fmt: skip


class FirstRung(Progress):
    """Shows progress, and notes when the first verified rung beyond the original was there."""

    seconds: float | None = None
    start = 0.0

    def found(self, trial: Trial, best: Trial | None) -> None:
        if best is not None and self.seconds is None:
            self.seconds = time.monotonic() - self.start
        super().found(trial, best)


def run(name: str) -> None:
    case = CASES[name]()
    goal = "drop <= 1%" + (f" @ batch {case.batch}" if case.batch > 1 else "")
    folder = Path(os.environ.get("ACCELERANDO_BENCH_FOLDER", tempfile.mkdtemp()), name)
    watcher = FirstRung(None)
    watcher.start = time.monotonic()
    result = accelerate(
        case.model, case.data, goal, train=case.train, metric=case.metric, budget=BUDGET, into=folder, progress=watcher
    )
    took = time.monotonic() - watcher.start
    print(result)
    body = against_peers(case, result.bundle)
    first = f"{watcher.seconds:.0f} s" if watcher.seconds else "resumed"
    best = result.best
    facts, drop = result.bundle.run, best.evidence.relative_drop
    body += (
        f"\n\nOurs is `{best.recipe}`, certified at {span(best.evidence.speedup)} times the original's speed, drop "
        f"{drop.mid:.2%} (at most {drop.high:.2%}); verdict: {result.verdict}. First rung after {first}; the whole "
        f"call took {took:.0f} s ({facts['trials']} recipes; it stopped because: {facts['why_stopped']})."
    )
    record(name, case.title, body)


def against_peers(case: Case, bundle: Bundle) -> str:
    """The contest of the best rung with every peer, as a table."""
    workload = adopt(case.model, case.data, train=case.train, metric=case.metric)
    rows, metric = workload.certify.take(2000), workload.metric
    found = dict(prepare(workload.model, workload.calibrate, rows, case.batch))
    peers = [p for p in found.values() if not isinstance(p, str)]
    rung = bundle.ladder.rungs[bundle.best]
    with tempfile.TemporaryDirectory() as folder:
        save_samples(rows, Path(folder) / "rows")
        subject = Subject(rung.recipe, rung.artifact, bundle.folder(rung), workload.model.content)
        with Arm(subject, bundle.signature, Path(folder), "rows", case.batch) as ours:
            seen = contest(peers, ours, ROUNDS)
            scores = ours.scores(Path(folder) / "rows", metric, 300.0)
    qualities = {"ours": float(metric.value(scores.mean(axis=0)))}
    for peer in peers:
        qualities[peer.name] = quality(peer.outputs(rows, bundle.signature), rows, metric)
        peer.close()
    lines = [standing(n, seen, qualities[n]) for n in seen]
    allowed = abs(qualities["eager"]) * 0.01
    sign = 1 if metric.higher_is_better else -1
    fair = [s for s in lines if s.name != "ours" and sign * (qualities["eager"] - s.quality) <= allowed]
    best = max(fair, key=lambda s: s.over_eager.mid)
    body = table(
        ["contestant", "times faster than eager", "ours over it", "p50", metric.name],
        [
            [s.name, span(s.over_eager), span(s.ours_over_it), f"{s.seconds * 1e6:,.0f} us", f"{s.quality:.4f}"]
            for s in sorted(lines, key=lambda s: -s.over_eager.mid)
        ],
    )
    failed = [f"{name} failed: {why}" for name, why in found.items() if isinstance(why, str)]
    met = "reached" if best.ours_over_it.mid >= 0.97 else "not reached"
    body += (
        f"\n\nOurs over the best single tool within 1 % ({best.name}): **{span(best.ours_over_it)}**; "
        f"asked for: at least 0.97, {met}."
    )
    return "\n\n".join([body, *failed])


def quality(outputs: np.ndarray, rows: Any, metric: Metric) -> float:
    return float(metric.value(metric.scores(outputs, rows.targets[: len(outputs)]).mean(axis=0)))


def span(interval: Any) -> str:
    return f"{interval.mid:.2f} ({interval.low:.2f} to {interval.high:.2f})"
