"""Which technique could help which layer, and why: derived from where the layer stands, promised by nobody."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerando.profile.layers import Layer
from accelerando.profile.roofline import Bound, Roofs, Standing

LONG_KERNEL = 128  # positions, from where a convolution by FFT is worth a trial
WORTH = 1.2  # int8 must be at least this much faster here to be worth its loss
PRODUCTS = ("convolution", "linear", "matmul", "attention", "recurrent")


@dataclass(frozen=True)
class Hint:
    """A technique or a backend that could help, and why."""

    technique: str
    why: str


@dataclass(frozen=True)
class Help:
    """What one technique could do for the whole model.

    `share` of the model's time is in the `layers` that it could help; were they free, the model would be `at_most`
    times faster (Amdahl 1967).
    """

    hint: Hint
    layers: int
    share: float

    @property
    def at_most(self) -> float | None:
        return 1 / (1 - self.share) if self.share < 0.99 else None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self.hint), "layers": self.layers, "share": self.share, "at_most": self.at_most}


def hints(layer: Layer, standing: Standing, roofs: Roofs, form: str = "torch") -> tuple[Hint, ...]:
    """What could help this layer, the likeliest first."""
    return tuple(_hints(layer, standing, roofs, form))


def _hints(layer: Layer, standing: Standing, roofs: Roofs, form: str) -> Iterator[Hint]:
    bound = standing.bound
    if layer.kernel >= LONG_KERNEL:
        yield Hint("convolution by FFT", "long kernels cost n log n by FFT instead of n times the kernel's length")
    if layer.kind.startswith("BatchNorm"):
        yield Hint("fold", "in eval mode it is a scale and a shift, which the layer before it can take in")
    if layer.family in PRODUCTS and bound is Bound.COMPUTE:
        yield from _fewer_products(layer, roofs)
    if bound is Bound.MEMORY:
        yield from _fewer_bytes(layer)
    if bound is Bound.OVERHEAD:
        yield Hint("a compiler backend", "starting its operations costs more than their work: fused, they start once")
    if bound is Bound.KERNEL:
        other = "OpenVINO, inductor" if form == "onnx" else "ONNX Runtime, OpenVINO, inductor"
        yield Hint("another backend's kernel", f"its kernel is far from this machine's roofs: try {other}")
        if layer.family in PRODUCTS:
            yield from _fewer_products(layer, roofs)


def _fewer_products(layer: Layer, roofs: Roofs) -> Iterator[Hint]:
    gain = roofs.int8 / roofs.float32
    if layer.precision == "float32" and gain >= WORTH:
        name = "quantize_dynamic" if layer.family == "recurrent" else "quantize_static"
        yield Hint(name, f"int8 products were measured {gain:.1f}x as fast here as float32 ones")
    if layer.weight_bytes:
        yield Hint("pruning, low rank or distilling", "fewer products, where the quality bears it")


def _fewer_bytes(layer: Layer) -> Iterator[Hint]:
    weights = layer.moved_bytes - layer.activation_bytes
    if layer.family == "embedding":
        return
    if weights > layer.activation_bytes and layer.precision == "float32":
        yield Hint("quantize_weights", "it waits for its weights; in int8 they are a quarter of the bytes")
        yield Hint("a larger batch", "every weight that is read then serves more rows")
    elif layer.family in ("pointwise", "normalization", "view") or not weights:
        yield Hint(
            "a compiler backend", "it moves activations and computes little: fused into its neighbours it is free"
        )
    else:
        yield Hint("half", "it waits for its activations; in 16 bits they are half the bytes")


def helps(layers: Sequence[Layer], found: Sequence[tuple[Hint, ...]], covered: float = 1.0) -> tuple[Help, ...]:
    """What each technique could do for the whole model, of whose time the layers cover a share; the best first."""
    total = (sum(layer.seconds.mid for layer in layers) or 1.0) / covered if covered else 1.0
    by: dict[str, tuple[Hint, list[float]]] = {}
    for layer, mine in zip(layers, found, strict=True):
        for hint in {h.technique: h for h in mine}.values():
            by.setdefault(hint.technique, (hint, []))[1].append(layer.seconds.mid)
    rows = [Help(hint, len(times), sum(times) / total) for hint, times in by.values()]
    return tuple(sorted(rows, key=lambda h: -h.share))
