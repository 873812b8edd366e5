"""A convolution that multiplies spectra: the module that takes a torch convolution's place."""

from __future__ import annotations

from typing import Any

import numpy as np

from accelerando.signature import Array
from accelerando.techniques._fft_plan import Plan

# Letters of the shapes below: b batch, g groups, i and o channels of a group that come in and go out, s blocks,
# f frequencies (half * columns), 2 the real and the imaginary part.


def fft_layer(conv: Any, plan: Plan) -> Any:
    """A torch module that answers as `conv` (nn.Conv1d or nn.Conv2d, in float32) does, made of matrix products.

    Its kernel is a constant: it is not for training.  A line whose plan has one block takes no longer input than
    the one that was planned for.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    flat = conv.weight.ndim == 3
    groups, blocks, half = conv.groups, plan.blocks, plan.half
    inputs, outputs = conv.in_channels // groups, conv.out_channels // groups
    channels, mixes = conv.in_channels, inputs > 1  # each frequency is a small matrix product then
    stride, words = conv.stride, f"{conv}, by FFT of {plan}"
    span = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    edges = [int(n) for n in conv._reversed_padding_repeated_twice]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode

    class FftLayer(nn.Module):
        first: Any
        second: Any
        back_first: Any
        back_second: Any
        cosine: Any
        sine: Any
        kernel: Any
        bias: Any

        def __init__(self, constants: dict[str, Any]) -> None:
            super().__init__()
            for name, constant in constants.items():
                self.register_buffer(name, constant)

        def forward(self, x: Any) -> Any:
            x = functional.pad(x, edges, mode=mode)
            answers = x.shape[-1] - span[-1] + 1
            spectrum = self.turn(self.first @ self.cut(x)) @ self.second  # (b, gi, s, half, 2 * columns)
            mixed = self.mix(spectrum) if mixes else self.scale(spectrum)
            y = self.back_first @ self.unturn(mixed @ self.back_second)  # (b, go, s, fresh, kept)
            y = y.flatten(2)[..., :answers] if flat else y[:, :, 0]
            y = y[(..., *(slice(None, None, step) for step in stride))]
            return y if self.bias is None else y + self.bias

        def cut(self, x: Any) -> Any:
            """Blocks of the padded input, (b, gi, s, rows, columns)."""
            if not flat:
                return x.unsqueeze(2)
            hop, length = plan.fresh * plan.columns, x.shape[-1]
            if blocks == 1:
                room = plan.rows * plan.columns - length
                if room < 0:
                    raise ValueError(f"the input is {length} long with its padding, but {length + room} were planned")
                return functional.pad(x, (0, room)).reshape(-1, channels, 1, plan.rows, plan.columns)
            count = (length - span[-1] + hop) // hop  # never of a negative number: exporters round towards zero
            x = functional.pad(x, (0, (count + 1) * hop - length))
            x = x.reshape(-1, channels, count + 1, plan.fresh, plan.columns)
            return torch.cat([x[:, :, :-1], x[:, :, 1:, : plan.overlap]], 3)

        def turn(self, x: Any) -> Any:
            """The real part above the imaginary one -> side by side, times the twiddle factors."""
            real, imaginary = x[..., :half, :], x[..., half:, :]
            if flat:
                real, imaginary = self.rotate(real, imaginary, self.sine)
            return torch.cat([real, imaginary], -1)

        def unturn(self, x: Any) -> Any:
            """Side by side -> the real part above the imaginary one, times the conjugate twiddle factors."""
            real, imaginary = x[..., : plan.kept], x[..., plan.kept :]
            if flat:
                real, imaginary = self.rotate(real, imaginary, -self.sine)
            return torch.cat([real, imaginary], -2)

        def rotate(self, real: Any, imaginary: Any, sine: Any) -> tuple[Any, Any]:
            return real * self.cosine - imaginary * sine, real * sine + imaginary * self.cosine

        def scale(self, x: Any) -> Any:
            """Each channel's spectrum times those of its kernels; real and imaginary parts side by side."""
            real, imaginary = x[:, :, None, ..., : plan.columns], x[:, :, None, ..., plan.columns :]
            a, b = self.kernel[0], self.kernel[1]  # (g, o, 1, half, columns)
            product = torch.cat([real * a - imaginary * b, real * b + imaginary * a], -1)
            return product.flatten(1, 2)

        def mix(self, x: Any) -> Any:
            """At each frequency, all channels of a group times their kernels; real and imaginary parts alternate."""
            batch, count = (-1, blocks) if blocks else (x.shape[0], -1)
            x = x.reshape(batch, groups, inputs, count, half * plan.columns, 2).permute(1, 4, 0, 3, 5, 2)
            products = x.flatten(2, 4) @ self.kernel  # (g, f, b s 2, i) @ (g, f, i, 2 o)
            p = products.reshape(groups, half * plan.columns, batch, count, 2, 2, outputs)
            y = torch.stack([p[..., 0, 0, :] - p[..., 1, 1, :], p[..., 0, 1, :] + p[..., 1, 0, :]], 4)
            return y.permute(2, 0, 5, 3, 1, 4).reshape(batch, groups * outputs, count, half, 2 * plan.columns)

        def extra_repr(self) -> str:
            return words

    matrices = {**_matrices(plan, flat, mixes), "kernel": _spectrum(conv, plan, flat, mixes)}
    constants = {k: torch.from_numpy(np.ascontiguousarray(m, dtype=np.float32)) for k, m in matrices.items()}
    bias = None if conv.bias is None else conv.bias.detach().clone().reshape(-1, *[1] * len(span))
    return FftLayer({**constants, "bias": bias}).eval()


def _matrices(plan: Plan, flat: bool, alternate: bool) -> dict[str, Array]:
    """The constant matrices, in float64: transforms of rows and columns, forth and back, and the twiddle factors."""
    rows, columns = np.arange(plan.rows), np.arange(plan.columns)
    low = np.arange(plan.half)
    outer = np.exp(-2j * np.pi * np.outer(low, rows) / plan.rows)  # (half, rows)
    inner = np.exp(-2j * np.pi * np.outer(columns, columns) / plan.columns)
    once = (low == 0) | (2 * low == plan.rows)  # rows without a conjugate counterpart
    back = outer.conj().T[: plan.fresh] * np.where(once, 1.0, 2.0)  # (fresh, half)
    order = np.arange(2 * plan.columns)
    if alternate:
        order = order.reshape(2, -1).T.ravel()
    found = {
        "first": np.concatenate([outer.real, outer.imag]),
        "second": _real(inner)[:, order],
        "back_second": _real(inner.conj()[:, : plan.kept])[order],
        "back_first": np.concatenate([back.real, -back.imag], 1),
    }
    if flat:
        twiddle = np.exp(-2j * np.pi * np.outer(low, columns) / (plan.rows * plan.columns))
        found |= {"cosine": twiddle.real, "sine": twiddle.imag}
    return found


def _real(matrix: Array) -> Array:
    """The matrix that does to [real | imaginary] what a complex one does, multiplied from the right."""
    return np.block([[matrix.real, matrix.imag], [-matrix.imag, matrix.real]])


def _spectrum(conv: Any, plan: Plan, flat: bool, mixes: bool) -> Array:
    """The kernels' conjugate spectra, scaled for the way back: of a correlation, which torch calls convolution.

    (2, g, o, 1, half, columns), or (g, f, i, 2 o) where frequencies are matrix products.
    """
    weight = conv.weight.detach().cpu().double().numpy()  # (g o, i, ...)
    rows, columns, low = plan.rows, plan.columns, np.arange(plan.half)
    if flat:
        line = np.zeros((*weight.shape[:2], rows * columns))
        line[..., : conv.dilation[0] * weight.shape[2] : conv.dilation[0]] = weight
        spectrum = np.fft.fft(line)[..., low[:, None] + rows * np.arange(columns)]
    else:
        (down, across), (height, width) = conv.dilation, weight.shape[2:]
        area = np.zeros((*weight.shape[:2], rows, columns))
        area[..., : down * height : down, : across * width : across] = weight
        spectrum = np.fft.fft2(area)[..., low, :]
    spectrum = spectrum.conj() / (rows * columns)
    spectrum = spectrum.reshape(conv.groups, -1, *spectrum.shape[1:])  # (g, o, i, half, columns)
    parts = np.stack([spectrum.real, spectrum.imag])
    if not mixes:
        return parts
    parts = parts.reshape(*parts.shape[:4], -1)  # (2, g, o, i, f)
    parts = parts.transpose(1, 4, 3, 0, 2)  # (g, f, i, 2, o)
    return parts.reshape(*parts.shape[:3], -1)


def exact_convolution(conv: Any, x: Any) -> Any:
    """What a torch convolution answers, by torch's own FFT in float64: what rewritten ones are held against."""
    import torch
    from torch.nn import functional

    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    batched = x.ndim == conv.weight.ndim
    padded = functional.pad(x if batched else x[None], conv._reversed_padding_repeated_twice, mode=mode).double()
    weight, axes, size = conv.weight.detach().double(), tuple(range(2, conv.weight.ndim)), padded.shape[2:]
    wide = weight.new_zeros(*weight.shape[:2], *size)
    taps = tuple(slice(0, d * (k - 1) + 1, d) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    wide[(..., *taps)] = weight
    kernel = torch.fft.rfftn(wide, dim=axes).conj().unflatten(0, (conv.groups, -1))
    signal = torch.fft.rfftn(padded, dim=axes).unflatten(1, (conv.groups, -1))
    product = torch.einsum("bgi...,goi...->bgo...", signal, kernel).flatten(1, 2)
    whole = torch.fft.irfftn(product, s=size, dim=axes)
    answers = (slice(0, n - taps_.stop + 1, s) for n, taps_, s in zip(size, taps, conv.stride, strict=True))
    y = whole[(..., *answers)]
    if conv.bias is not None:
        y = y + conv.bias.detach().double().reshape(-1, *[1] * len(size))
    y = y.to(x.dtype)
    return y if batched else y[0]
