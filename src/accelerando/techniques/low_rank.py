"""Low rank: a linear layer or a convolution becomes two or three smaller ones, where these are measured faster."""

from __future__ import annotations

import copy
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Array
from accelerando.techniques._factors import Factors, Parts, observe_layers
from accelerando.techniques._parity import answer_torch, example
from accelerando.techniques._tucker import triple
from accelerando.workload import Form, Model, Samples, flat_module

LEAST_GAIN = 1.15  # by multiply-adds; below it the other layers' own cost eats what was saved
ROWS = 128  # of the calibration data, to see the layers' answers on
ROUNDS = 11
BLOCK_SECONDS = 0.5e-3  # of one arm in one round
UNREPLACEABLE = (AttributeError, TypeError, RuntimeError)

_stopwatch: dict[tuple[Any, ...], float] = {}  # by layer and ranks: layers of one shape are measured once, and agree


@dataclass(frozen=True)
class LowRank(Technique):
    """Truncated factors of linear layers and of convolutions.

    Not the weights' own singular vectors but the principal directions of the layer's answers on calibration data are
    kept, which is the best that a rank can do there (Zhang, Zou, He and Sun, "Accelerating very deep convolutional
    networks", arXiv 1505.06798; for linear layers also SVD-LLM, arXiv 2403.07378).  A convolution becomes k x k to few
    channels, then 1 x 1 to all; or, of as many multiply-adds, 1 x 1 to few, k x k among few, 1 x 1 to all (Tucker-2:
    Kim et al., "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
    ICLR 2016).  Of forms that are measured faster than the whole, the one with the least error times seconds is taken.

    Args:
        share: of the multiply-adds of the layers that are factored; a layer stays whole where no smaller ones are
            measured faster, at batch 1 in torch.
        energy: ranks where they keep most of the answers' variance for their cost; else every layer gives `share`.
        convolutions: factor these too.
    """

    share: float = 0.5
    energy: bool = True
    convolutions: bool = True

    takes: ClassVar[Form] = Form.TORCH
    gives: ClassVar[Form] = Form.TORCH
    stage: ClassVar[Stage] = Stage.SHAPE
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    typical_seconds: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, both excluded, but is {self.share!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[LowRank]:
        return [cls(), cls(energy=False)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return self._nothing(model.content) if model.form is Form.TORCH else None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        if refusal := self._nothing(model.content):
            raise refusal
        cut = model.changed(Form.TORCH, copy.deepcopy(model.content))
        layers = observe_layers(cut, data.take(ROWS), self._names(cut.content))
        ranks = _spread(layers, self.share) if self.energy else {n: f.rank(self.share) for n, f in layers.items()}
        leaves, done, whole = example(model.signature, data), list[str](), list[str]()
        for name, factors in layers.items():
            words = f"{name} ({' x '.join(map(str, factors.layer.weight.shape))}, "
            parts, speed = _best(factors, ranks[name])
            if speed < 1:
                whole.append(f"{words}{parts}) {speed:.2f} x")
            elif _replace(cut, name, parts.module, leaves):
                done.append(f"{words}{parts})")
            else:
                whole.append(f"{words}{parts}) is read by its owner")
        if not done:
            raise RefusalError(Reason.NOTHING_TO_DO, f"no layer is faster in parts: {_listed(whole)}")
        log = [f"low_rank: {len(done)} of {len(layers)} layers became smaller ones: {_listed(done)}"]
        log += [f"low_rank: left whole, for in parts they are no faster: {_listed(whole)}"] if whole else []
        return model.changed(Form.TORCH, cut.content, *log)

    def _nothing(self, module: Any) -> RefusalError | None:
        if self._names(module):
            return None
        kinds = "linear layer or convolution" if self.convolutions else "linear layer"
        return RefusalError(Reason.NOTHING_TO_DO, f"it holds no {kinds} with weights of its own")

    def _names(self, module: Any) -> list[str]:
        """Layers that may become two: of the plain kinds, with a weight that nothing else holds."""
        import torch.nn as nn

        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if self.convolutions else (nn.Linear,)
        holders = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        return [
            name
            for name, m in module.named_modules()
            if name and type(m) in kinds and getattr(m, "groups", 1) == 1 and holders[id(m.weight)] == 1
        ]


def _spread(layers: dict[str, Factors], share: float) -> dict[str, int]:
    """Ranks for the same total of multiply-adds: directions are taken by the variance that they keep for their cost."""
    cost = {name: f.cost_of_rank for name, f in layers.items()}
    budget = (1 - share) * sum(f.cost for f in layers.values())
    ranks = dict.fromkeys(layers, 1)
    spent = sum(cost.values())
    offers = [
        (float(value) / cost[name], -i, name)
        for name, f in layers.items()
        for i, value in enumerate(f.energies / max(f.energies.sum(), 1e-30))
        if i and value > 0
    ]
    for _, _, name in sorted(offers, reverse=True):
        if spent + cost[name] > budget:
            break
        spent, ranks[name] = spent + cost[name], ranks[name] + 1
    return {name: f.rounded(ranks[name]) for name, f in layers.items()}


def _best(factors: Factors, rank: int) -> tuple[Parts, float]:
    """The layers for the cost of this rank that lose least for their time, and how much faster than the whole they are.

    Where none is faster, those that are the least slower.
    """
    pair = factors.pair(rank)
    forms = [parts for parts in (pair, triple(factors, pair.cost)) if parts is not None]
    speeds = [_speed(factors, parts) for parts in forms]
    faster = [i for i, speed in enumerate(speeds) if speed >= 1]
    if len(faster) > 1:
        best = min(faster, key=lambda i: factors.error(forms[i]) / speeds[i])
    else:
        best = speeds.index(max(speeds))
    return forms[best], speeds[best]


def _speed(factors: Factors, parts: Parts) -> float:
    """How much faster the parts are than the whole layer; 0 where multiply-adds say that they can't be.

    The median over rounds in which both take turns; layers of one shape are measured once.
    """
    import torch

    if factors.cost < LEAST_GAIN * parts.cost:
        return 0.0
    key = repr(factors.layer), str(factors.layer.weight.dtype), parts.ranks, factors.shape
    if key not in _stopwatch:
        given = torch.ones(factors.shape, dtype=factors.layer.weight.dtype)
        with torch.inference_mode():
            for arm in (factors.layer, parts.module):
                _seconds(arm, given, 3)
            calls = max(1, int(BLOCK_SECONDS / _seconds(factors.layer, given, 3)))
            rounds = []
            for i in range(ROUNDS):
                arms = (factors.layer, parts.module) if i % 2 else (parts.module, factors.layer)
                seconds = {id(arm): _seconds(arm, given, calls) for arm in arms}
                rounds.append(seconds[id(factors.layer)] / seconds[id(parts.module)])
        _stopwatch[key] = statistics.median(rounds)
    return _stopwatch[key]


def _seconds(layer: Any, given: Any, calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        layer(given)
    return (perf_counter() - start) / calls


def _replace(model: Model, name: str, parts: Any, leaves: Sequence[Array]) -> bool:
    """Put smaller layers in the place of one; put it back, and say so, where its owner then fails."""
    import torch.nn as nn

    owner_name, _, key = name.rpartition(".")
    owner = model.content.get_submodule(owner_name)
    whole, owner._modules[key] = owner._modules[key], parts
    if isinstance(owner, nn.TransformerEncoderLayer):  # its fast path reads the weights of its linear layers
        owner.activation_relu_or_gelu = 0
        for encoder in (m for m in model.content.modules() if isinstance(m, nn.TransformerEncoder)):
            encoder.use_nested_tensor = False
    try:
        answer_torch(flat_module(model), leaves)
    except UNREPLACEABLE:
        owner._modules[key] = whole
        return False
    return True


def _listed(items: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest
