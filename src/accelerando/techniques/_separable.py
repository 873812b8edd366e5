"""The best separable stand-in for a convolution: W[o, i, :] ~ sum over m of P[o, i m] D[i m, :].

For each input channel i, the best D and P are the leading singular vectors of W[:, i] (Guo et al., "Network
Decoupling", BMVC 2018), here of W[:, i] times a root of the second moment of that channel's patches, so that what
counts is the answer on real inputs and not the weights.  P is then fitted again to all channels together by least
squares, which repairs what the channels have in common (as the asymmetric reconstruction of Zhang et al.,
"Accelerating Very Deep Convolutional Networks", TPAMI 2016, does).  A kernel that is separable comes out exactly.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

from accelerando.signature import Array
from accelerando.workload import Model

MOST_NUMBERS = 1 << 24  # of patches at a time: 64 MiB
RIDGE = 1e-4  # of a matrix' mean diagonal: what float32 and a few rows can tell


class Separation(NamedTuple):
    """A convolution's stand-in: what it saves and costs, and its weights.

    `saved` is multiply-adds per row; `error` the share of the answer's energy that it misses on calibration data.
    """

    name: str
    saved: float
    error: float
    depthwise: Any  # (i m, 1, *kernel)
    pointwise: Any  # (o, i m, 1...)


def candidates(module: Any, filters: int) -> dict[str, Any]:
    """Full convolutions that would save multiply-adds, by name."""
    return {name: m for name, m in _convolutions(module).items() if m.groups == 1 and _saved(m, filters) > 0}


def separations(model: Model, rows: list[Array], filters: int) -> tuple[list[Separation], float]:
    """Every separation that can be made, and the multiply-adds per row of all convolutions."""
    import torch

    module = copy.deepcopy(model.content)
    found: dict[str, Separation] = {}
    positions: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(conv: Any, inputs: Any, answer: Any) -> None:
            first = name not in positions
            positions[name] = positions.get(name, 0) + math.prod(answer.shape[-_rank(conv) :])
            if first and name in fitted:
                found[name] = _fit(name, conv, inputs[0], filters)

        return see

    fitted = candidates(module, filters)
    convolutions = _convolutions(module)
    for name, conv in convolutions.items():
        conv.register_forward_hook(hook(name))
    args, kwargs = model.signature.call([torch.from_numpy(x) for x in rows])
    with torch.no_grad():
        module(*args, **kwargs)
    total = sum(positions[n] * _full(convolutions[n]) for n in positions)
    return [s._replace(saved=positions[n] * _saved(convolutions[n], filters)) for n, s in found.items()], total


def separated(module: Any, chosen: list[Separation]) -> Any:
    """A copy of the module with these convolutions replaced, wherever they are used."""
    made = copy.deepcopy(module)
    instead: dict[Any, Any] = {made.get_submodule(s.name): _pair(made.get_submodule(s.name), s) for s in chosen}
    for parent in list(made.modules()):
        for key, child in parent._modules.items():
            if child in instead:
                parent._modules[key] = instead[child]
    return instead.get(made, made)


def _pair(conv: Any, separation: Separation) -> Any:
    import torch

    kind, wide = type(conv), separation.depthwise.shape[0]
    depthwise = kind(
        conv.in_channels, wide, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        groups=conv.in_channels, bias=False, padding_mode=conv.padding_mode,
    )  # fmt: skip
    pointwise = kind(wide, conv.out_channels, 1, bias=conv.bias is not None)
    with torch.no_grad():
        depthwise.weight.copy_(separation.depthwise)
        pointwise.weight.copy_(separation.pointwise)
        if conv.bias is not None:
            pointwise.bias.copy_(conv.bias)
    pair = torch.nn.Sequential(depthwise, pointwise).to(conv.weight).train(conv.training)
    return pair.requires_grad_(conv.weight.requires_grad)


def _fit(name: str, conv: Any, x: Any, filters: int) -> Separation:
    import torch

    moment = _second_moment(conv, x)
    inputs, outputs, taps = conv.in_channels, conv.out_channels, math.prod(conv.kernel_size)
    weight = conv.weight.detach().float().reshape(outputs, inputs, taps).transpose(0, 1)  # (i, o, k)
    own = torch.stack([moment[i, :, i, :] for i in range(inputs)]).double()  # (i, k, k): each channel's own patches
    root = torch.linalg.cholesky(_ridged(own))
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    few = min(filters, s.shape[-1])
    depthwise = torch.linalg.solve_triangular(root, v[:, :few], upper=False, left=False)  # (i, m, k)
    pointwise = u[..., :few] * s[:, None, :few]  # (i, o, m)
    scale = depthwise.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    depthwise, pointwise = depthwise / scale, pointwise * scale.transpose(1, 2)
    depthwise, pointwise = _padded(depthwise, 1, filters).float(), _padded(pointwise, 2, filters).float()
    pointwise, error = _refit(weight, depthwise, pointwise, moment)
    kernel, ones = conv.kernel_size, (1,) * _rank(conv)
    return Separation(
        name,
        0.0,
        error,
        depthwise.reshape(inputs * filters, 1, *kernel),
        pointwise.transpose(0, 1).reshape(outputs, inputs * filters, *ones),
    )


def _refit(weight: Any, depthwise: Any, pointwise: Any, moment: Any) -> tuple[Any, float]:
    """The pointwise weights that fit all channels together, and the share of energy that is still missed."""
    import torch

    inputs, outputs, taps = weight.shape
    width, flat = depthwise.shape[0] * depthwise.shape[1], moment.reshape(inputs * taps, inputs * taps)

    def mapped(point: Any) -> Any:  # the full kernel of a separable one, (o, i k)
        return torch.einsum("iom,imk->oik", point, depthwise).reshape(outputs, -1)

    whole = weight.transpose(0, 1).reshape(outputs, -1)
    seen = torch.einsum("ajbk,bmk->ajbm", moment, depthwise)  # E[patch, depthwise answer]
    cross = torch.einsum("ajbm,anj->anbm", seen, depthwise).reshape(width, width)
    missed = (whole - mapped(pointwise)) @ seen.reshape(inputs * taps, width)
    correction = torch.linalg.solve(_ridged(cross), missed, left=False)
    better = pointwise + correction.reshape(outputs, inputs, -1).transpose(0, 1)

    def energy(kernel: Any) -> float:
        return float(((kernel @ flat) * kernel).sum())

    most = max(energy(whole), 1e-30)
    before, after = (max(energy(whole - mapped(p)), 0.0) / most for p in (pointwise, better))
    return (better, after) if after < before else (pointwise, before)


def _second_moment(conv: Any, x: Any) -> Any:
    """E[patch patch^T] over rows and positions, (i, k, i, k), as the convolution's own stride and padding cut them."""
    import torch

    inputs, taps = conv.in_channels, math.prod(conv.kernel_size)
    cut = type(conv)(
        inputs, inputs * taps, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        groups=inputs, bias=False, padding_mode=conv.padding_mode,
    )  # fmt: skip
    with torch.no_grad():
        cut.weight.copy_(torch.eye(taps).repeat(inputs, 1).reshape(inputs * taps, 1, *conv.kernel_size))
    x = x.detach().float()
    x = x[None] if x.ndim == _rank(conv) + 1 else x
    each = inputs * taps * max(1, math.prod(x.shape[2:]) // math.prod(conv.stride))
    x = x[: max(1, MOST_NUMBERS // each)]
    patches = cut(x).flatten(2).transpose(1, 2).reshape(-1, inputs * taps)
    return (patches.T @ patches / len(patches)).reshape(inputs, taps, inputs, taps)


def _ridged(matrices: Any) -> Any:
    """Symmetric matrices (..., n, n), made safely positive definite."""
    import torch

    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return matrices + RIDGE * (mean + 1e-12) * torch.eye(matrices.shape[-1], dtype=matrices.dtype)


def _padded(x: Any, axis: int, length: int) -> Any:
    """Zeros after what there is: a kernel of few taps has no more singular vectors."""
    import torch

    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([x, x.new_zeros(shape)], axis)


def _convolutions(module: Any) -> dict[str, Any]:
    import torch

    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {name: m for name, m in module.named_modules() if type(m) in kinds}


def _rank(conv: Any) -> int:
    return len(conv.kernel_size)


def _full(conv: Any) -> int:
    """Multiply-adds per position of the answer."""
    return conv.out_channels * conv.in_channels // conv.groups * math.prod(conv.kernel_size)


def _saved(conv: Any, filters: int) -> int:
    """Multiply-adds per position that a separable form saves."""
    wide = conv.in_channels * filters
    return _full(conv) - wide * (math.prod(conv.kernel_size) + conv.out_channels)
