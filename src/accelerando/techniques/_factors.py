"""A layer on the data: the principal directions of its answers, and two small layers that keep only those.

A layer answers W x + b.  Of all projections of rank r, the one on the r main directions U of W x on the data loses
least of its variance, so that W x + b ~ U (U^T W) x + b', with the mean kept by b' (Zhang, Zou, He and Sun, arXiv
1505.06798).  U^T W is a layer of the same kind with r channels, and U one without extent (1 x 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerando.techniques._blocks import first_of
from accelerando.techniques._parity import answer_torch, batch, example
from accelerando.workload import Model, Samples, flat_module

BATCH = 32
POSITIONS = 8192  # of one call's, evenly spread: more of an image's say the same
RIDGE = 1e-6  # of the variance: orders the directions that the data does not show by the weights alone
LANES = 8  # ranks are multiples of what vector units like
KEPT = 2**20  # numbers of its inputs that are kept of a convolution, to try what takes its place on them


@dataclass(frozen=True)
class Parts:
    """Smaller layers that can take a layer's place.

    Args:
        ranks: channels between them: one number for two layers, two for three.
        cost: multiply-adds for one row.
        module: nn.Sequential.
    """

    ranks: tuple[int, ...]
    cost: int
    module: Any

    def __str__(self) -> str:
        return f"rank{'s' if len(self.ranks) > 1 else ''} {' and '.join(map(str, self.ranks))}"


@dataclass(frozen=True)
class Factors:
    """A layer with the directions of its answers.

    Args:
        layer: nn.Linear, or an ungrouped nn.Conv1d, Conv2d or Conv3d.
        shape: of its input when the model is given one row.
        positions: at how many places the weight is applied then.
        directions: (out, k), orthonormal columns, the main one first.
        energies: (k,), the variance of the answers along each.
        center: (out,), the mean of the answers without the bias.
        spread: (in, in), second moment of the input's channels; None for a linear layer and a 1 x 1 convolution.
        rows: (n, in, ...), some inputs; likewise.
    """

    layer: Any
    shape: tuple[int, ...]
    positions: int
    directions: Any
    energies: Any
    center: Any
    spread: Any = None
    rows: Any = None

    @property
    def cost(self) -> int:
        """Multiply-adds of the whole layer for one row."""
        return self.positions * self.layer.weight.numel()

    @property
    def cost_of_rank(self) -> int:
        """Multiply-adds of the two layers for one row, for each rank."""
        out = len(self.layer.weight)
        return self.positions * (self.layer.weight.numel() // out + out)

    def rounded(self, rank: int) -> int:
        """The rank as it is used: whole vectors, at least 1, at most as many as there are directions."""
        return max(1, min(rank if rank < LANES else rank - rank % LANES, len(self.energies)))

    def rank(self, share: float) -> int:
        """The rank that takes this share of the multiply-adds away."""
        return self.rounded(int((1 - share) * self.cost / self.cost_of_rank))

    def pair(self, rank: int) -> Parts:
        """The two layers of this rank."""
        from torch import nn

        layer, kind = self.layer, type(self.layer)
        blank: Any = nn.utils.skip_init  # draws no random weights
        weight, u = layer.weight.detach(), self.directions[:, :rank]
        narrow = (u.T @ weight.double().flatten(1)).reshape(rank, *weight.shape[1:])
        bias = self.center - u @ (u.T @ self.center) + (0 if layer.bias is None else layer.bias.detach().double())
        wide = u.reshape(*u.shape, *(1 for _ in weight.shape[2:]))
        if kind is nn.Linear:
            one = blank(kind, layer.in_features, rank, bias=False)
            two = blank(kind, rank, layer.out_features)
        else:
            extent = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "padding_mode")}
            one = blank(kind, layer.in_channels, rank, layer.kernel_size, bias=False, **extent)
            two = blank(kind, rank, layer.out_channels, 1)
        for part, name, value in ((one, "weight", narrow), (two, "weight", wide), (two, "bias", bias)):
            setattr(part, name, nn.Parameter(value.to(weight.dtype).contiguous(), layer.weight.requires_grad))
        return Parts((rank,), rank * self.cost_of_rank, nn.Sequential(one, two).train(layer.training))

    def error(self, parts: Parts) -> float:
        """How far off the answers to the kept rows are, as a share of their energy."""
        import torch

        with torch.no_grad():
            wanted = self.layer(self.rows)
            return float((parts.module(self.rows) - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))


class _Moments:
    """First and second moment of a layer's inputs (where they have fewer features than its answers) or answers.

    Of a convolution with an extent, the second moment of its input's channels as well.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.of_inputs = layer.weight.ndim == 2 and layer.weight.shape[1] < layer.weight.shape[0]
        self.extended = layer.weight[0, 0].numel() > 1
        self.count, self.total, self.square = 0, 0.0, 0.0
        self.spread: Any = 0.0  # a sum: only its directions count
        self.rows: Any = None

    def add(self, taken: Any, answer: Any) -> None:
        vectors = self._vectors(taken if self.of_inputs else answer)
        if not self.of_inputs and self.layer.bias is not None:
            vectors = vectors - self.layer.bias
        self.count += len(vectors)
        self.total = self.total + vectors.sum(0)
        self.square = self.square + vectors.T @ vectors
        if self.extended:
            inputs = self._vectors(taken)
            self.spread = self.spread + inputs.T @ inputs
            if self.rows is None:
                rows = taken if taken.ndim == self.layer.weight.ndim else taken[None]
                self.rows = rows[: max(1, KEPT // rows[0].numel())].clone()

    def _vectors(self, value: Any) -> Any:
        """The channels of evenly spread positions, (n, channels)."""
        vectors = value.movedim(1 - self.layer.weight.ndim, -1).flatten(0, -2)
        return vectors[:: -(-len(vectors) // POSITIONS) or 1].double()

    def factors(self, shape: tuple[int, ...], positions: int) -> Factors:
        import torch

        weight = self.layer.weight.detach().double().flatten(1)
        mean: Any = self.total / self.count
        spread: Any = self.square / self.count - torch.outer(mean, mean)
        ridge = RIDGE * float(spread.trace().clamp_min(1e-12))
        if self.of_inputs:
            root = torch.linalg.cholesky(spread + ridge * torch.eye(len(spread), dtype=spread.dtype))
            directions, values, _ = torch.linalg.svd(weight @ root, full_matrices=False)
            return Factors(self.layer, shape, positions, directions, values.square().numpy(), weight @ mean)
        ground = weight @ weight.T
        values, directions = torch.linalg.eigh(spread + ground * (ridge / ground.trace().clamp_min(1e-12)))
        keep = min(weight.shape)  # W x has no more directions
        values, directions = values.flip(0)[:keep].clamp_min(0), directions.flip(1)[:, :keep]
        seen = (self.spread, self.rows) if self.extended else (None, None)
        return Factors(self.layer, shape, positions, directions.contiguous(), values.numpy(), mean, *seen)


def observe_layers(model: Model, data: Samples, names: Sequence[str]) -> dict[str, Factors]:
    """The factors of these layers of a TORCH model, in the order in which they run; what does not run is left out."""
    import torch

    flat, layers = flat_module(model), {name: model.content.get_submodule(name) for name in names}
    shapes: dict[str, tuple[tuple[int, ...], int]] = {}
    moments = {name: _Moments(layer) for name, layer in layers.items()}

    def see(name: str, taken: Any, answer: Any) -> None:
        shapes[name] = tuple(taken.shape), answer.numel() // len(layers[name].weight)

    def learn(name: str, taken: Any, answer: Any) -> None:
        moments[name].add(taken, answer)

    one = batch(model.signature, [x[:1] for x in example(model.signature, data)], 1)
    many = [batch(model.signature, chunk.inputs, len(chunk)) for chunk in data.batches(BATCH)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # else encoder layers read their linear layers' weights themselves
    try:
        for told, inputs in ((see, [one]), (learn, many)):
            hooks = [layer.register_forward_hook(_hook(told, n), with_kwargs=True) for n, layer in layers.items()]
            for leaves in inputs:
                answer_torch(flat, leaves)
            for hook in hooks:
                hook.remove()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {name: moments[name].factors(*seen) for name, seen in shapes.items() if moments[name].count}


def _hook(told: Any, name: str) -> Any:
    return lambda layer, args, kwargs, answer: told(name, first_of(args, kwargs), answer)
