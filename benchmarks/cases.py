"""Each case: our search within its budget, then a contest of its best rung with every single tool.

Some cases need the folders `cases` (trained models) and `data`, which are not part of the project: put the folder above
them into ACCELERANDO_CASES (by default `../shared`).  ACCELERANDO_BENCH_BUDGET overrides every budget.  Models that are
trained here are trained once: `training.weights_folder` says where their weights are kept.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from accelerando import accelerate
from accelerando.adoption import adopt
from accelerando.bundle import Bundle
from accelerando.measure.arm import Arm, Subject, save_samples
from accelerando.report.progress import Progress
from accelerando.trial import Trial
from benchmarks.peers import Standing, contest, prepare, standing
from benchmarks.results import record, table

BUDGET = os.environ.get("ACCELERANDO_BENCH_BUDGET")
ROUNDS = 40


@dataclass(frozen=True)
class Case:
    """What is accelerated, what is asked of it, and who else takes part.

    Args:
        teaching: what `accelerate` is given for retraining besides `train`, by name.
        rivals: modules that others made of this one, by name; they run in ONNX Runtime.
        over_best: how many times the speed of the best single tool is asked for.
    """

    title: str
    model: Any
    data: Any
    train: Any
    metric: str
    batch: int = 1
    goal: str = "drop <= 1%"
    budget: str = "6min"
    teaching: Mapping[str, Any] = field(default_factory=dict)
    rivals: Mapping[str, Any] = field(default_factory=dict)
    over_best: float = 0.97


def shared(part: str) -> Path:
    """A folder of what is not part of the project: `cases` or `data`."""
    folder = Path(os.environ.get("ACCELERANDO_CASES", str(Path(__file__).parents[2] / "shared")))
    if not (folder / part).is_dir():
        sys.exit(f"{folder} holds no folder `{part}`; name the folder above it in ACCELERANDO_CASES")
    return folder / part


def loaded(name: str) -> Any:
    sys.path.insert(0, str(shared("cases").parent))
    return getattr(__import__(f"cases.{name}"), name).build()


def trained(name: str, title: str) -> Callable[[], Case]:
    """A model trained elsewhere; 2,000 training rows, for calibration only."""

    def build() -> Case:
        case = loaded(name)
        return Case(title, case.model, case.test, tuple(a[:2000] for a in shuffled(case.train)), case.metric)

    return build


def healed(name: str, title: str, speedup: int, rivals: Callable[[Any, Any], dict[str, Any]]) -> Callable[[], Case]:
    """A model trained elsewhere, with all that it learned from, so that smaller shapes of it can be taught again."""

    def build() -> Case:
        case = loaded(name)
        return Case(
            title, case.model, case.test, case.train, case.metric,
            goal=f"speedup >= {speedup}, drop <= 1%", budget="30min", rivals=rivals(case.model, case.train),
        )  # fmt: skip

    return build


def nobody(model: Any, train: Any) -> dict[str, Any]:
    return {}


def pruner(model: Any, train: Any) -> dict[str, Any]:
    from benchmarks.rivals import pruned

    return {"torch-pruning (50 % channels, one epoch, ONNX Runtime)": pruned(model, train)}


def own(name: str, title: str) -> Callable[[], Case]:
    """A model of our own, trained here: `name` is the module of this package that has its data and its training."""

    def build() -> Case:
        module = importlib.import_module(f"benchmarks.{name}")
        train, judged = module.rows(shared("data"))
        model = module.trained(train)
        return Case(title, model, judged, train, module.METRIC, budget="20min", teaching=module.TEACHING, over_best=2.0)

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
    "vit-heal": healed("vit_mnist", "ViT on MNIST, healed, batch 1", 10, nobody),
    "resnet-heal": healed("resnet_cifar10", "ResNet-56 on CIFAR-10, healed, batch 1", 20, pruner),
    "spoken": own("spoken", "Spoken digits, a convnet on spectrograms, batch 1"),
    "sst2": own("sst2", "SST-2, a transformer of our own, batch 1"),
    "ett": own("ett", "ETTh1, a forecaster, batch 1"),
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
    goal = case.goal + (f" @ batch {case.batch}" if case.batch > 1 else "")
    folder = Path(os.environ.get("ACCELERANDO_BENCH_FOLDER", tempfile.mkdtemp()), name)
    watcher = FirstRung(None)
    watcher.start = time.monotonic()
    result = accelerate(
        case.model, case.data, goal, train=case.train, metric=case.metric, budget=BUDGET or case.budget, into=folder,
        progress=watcher, **case.teaching,
    )  # fmt: skip
    took = time.monotonic() - watcher.start
    print(result)
    body = against_peers(case, result.bundle)
    first = f"{watcher.seconds:.0f} s" if watcher.seconds else "resumed"
    best = result.best
    facts, drop = result.bundle.run, best.evidence.relative_drop
    body += (
        f"\n\nOurs is `{best.recipe}`, certified at {span(best.evidence.speedup)} times the original's speed, drop "
        f"{drop.mid:.2%} (at most {drop.high:.2%}); asked for: {goal}; verdict: {result.verdict}. First rung after "
        f"{first}; the whole call took {took:.0f} s ({facts['trials']} recipes; it stopped because: "
        f"{facts['why_stopped']})."
    )
    record(name, case.title, body)


def against_peers(case: Case, bundle: Bundle) -> str:
    """The contest of the best rung with every peer, as a table."""
    workload = adopt(case.model, case.data, train=case.train, metric=case.metric)
    rows, metric = workload.certify.take(2000), workload.metric
    found = dict(prepare(workload.model, workload.calibrate, rows, case.batch, case.rivals))
    peers = [p for p in found.values() if not isinstance(p, str)]
    rung = bundle.ladder.rungs[bundle.best]
    with tempfile.TemporaryDirectory() as folder:
        save_samples(rows, Path(folder) / "rows")
        subject = Subject(rung.recipe, rung.artifact, bundle.folder(rung), workload.model.content)
        with Arm(subject, bundle.signature, Path(folder), "rows", case.batch) as ours:
            seen = contest(peers, ours, ROUNDS)
            scores = {"ours": ours.scores(Path(folder) / "rows", metric, 300.0)}
    for peer in peers:
        scores[peer.name] = metric.scores(peer.outputs(rows, bundle.signature), rows.targets)
        peer.close()
    lines = {n: standing(n, seen, scores, metric) for n in seen}
    body = table(
        ["contestant", "times faster than eager", "ours over it", "p50", metric.name, "drop"],
        [
            [s.name, span(s.over_eager), span(s.ours_over_it), f"{s.seconds * 1e6:,.0f} us", f"{s.quality:.4f}",
             f"{s.drop.mid:.2%} (at most {s.drop.high:.2%})"]
            for s in sorted(lines.values(), key=lambda s: -s.over_eager.mid)
        ],
    )  # fmt: skip
    failed = [f"{name} failed: {why}" for name, why in found.items() if isinstance(why, str)]
    rivals = [_against_rival(lines["ours"], lines[name]) for name in case.rivals if name in lines]
    return "\n\n".join([body, _against_best(lines, case.over_best), *rivals, *failed])


def _against_best(lines: Mapping[str, Standing], asked: float) -> str:
    """Ours over the fastest that keeps its quality; a tool need not certify that, its measured drop is enough."""
    fair = [s for s in lines.values() if s.name != "ours" and s.drop.mid <= 0.01]
    best = max(fair, key=lambda s: s.over_eager.mid)
    return (
        f"Ours over the best single tool within 1 % ({best.name}): **{span(best.ours_over_it)}**; asked for: at least "
        f"{asked:g}, {_met(best.ours_over_it.mid >= asked)}."
    )


def _against_rival(ours: Standing, rival: Standing) -> str:
    good = rival.ours_over_it.low > 1 and ours.drop.mid <= rival.drop.mid
    return (
        f"Ours over {rival.name}: {span(rival.ours_over_it)}, with a drop of {ours.drop.mid:.2%} against "
        f"{rival.drop.mid:.2%}; asked for: more speed at no more drop, {_met(good)}."
    )


def _met(good: bool) -> str:
    return "reached" if good else "not reached"


def span(interval: Any) -> str:
    return f"{interval.mid:.2f} ({interval.low:.2f} to {interval.high:.2f})"
