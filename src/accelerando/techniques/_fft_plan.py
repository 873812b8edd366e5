"""How a convolution is cut into Fourier transforms that are matrix products.

A block of `rows * columns` numbers is transformed in four steps (Bailey 1990, "FFTs in external or hierarchical
memory"): along its rows, by twiddle factors, along its columns; each is a product with a small constant matrix.  Every
runtime has those products at the speed of its best kernels, while a DFT operator is missing or slow in most.  An image
is the same without the twiddle factors.  Long lines are cut into blocks that overlap by the kernel (overlap-save).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

COLUMNS = (8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256)
MOST_ROWS = 512
MOST_BLOCKS = 256
# What weighs beside multiplications, in multiplications: a number that is read or written, and the start of a small
# matrix product.  From timing ONNX Runtime and OpenVINO with AVX-512; only their order of magnitude matters.
PER_NUMBER, PER_PRODUCT = 10, 2500


@dataclass(frozen=True)
class Plan:
    """The sizes of a convolution by FFT.

    Args:
        rows, columns: of a block; its transform has as many numbers.
        fresh: rows of answers that a block gives: the others are spoilt by the kernel's wrapping round.
        kept: columns of them.
        blocks: how many there are; None for as many as the input's length asks for.
    """

    rows: int
    columns: int
    fresh: int
    kept: int
    blocks: int | None

    @property
    def half(self) -> int:
        """Rows of the transform that are computed; the others are their conjugates."""
        return self.rows // 2 + 1

    @property
    def overlap(self) -> int:
        return self.rows - self.fresh

    def __str__(self) -> str:
        blocks = "" if self.blocks == 1 else f"{self.blocks or 'any number of'} blocks of "
        return f"{blocks}{self.rows} x {self.columns}"


def line(length: int, span: int, inputs: int, outputs: int, groups: int, dynamic: bool) -> Plan | None:
    """The cheapest plan for a line, or None where the kernel is too long for any.

    Args:
        length: of the input, padding included; the longest where it may change (`dynamic`).
        span: from the kernel's first number to its last.
        inputs, outputs: channels.
    """
    plans = list(_lines(length - span + 1, span, dynamic))
    if not plans:
        return None
    best = min(plans, key=lambda p: cost(p, inputs, outputs, groups))
    return Plan(best.rows, best.columns, best.fresh, best.kept, None) if dynamic else best


def _lines(answers: int, span: int, dynamic: bool) -> Iterator[Plan]:
    for columns in COLUMNS:
        total, overlap = ceil(answers / columns), ceil((span - 1) / columns)
        for blocks in range(1, min(total, MOST_BLOCKS) + 1):
            fresh = ceil(total / blocks)
            if overlap > fresh and (blocks > 1 or dynamic):
                break  # a block overlaps with its neighbour only
            if fresh + overlap <= MOST_ROWS:
                yield Plan(fresh + overlap, columns, fresh, columns, blocks)


def image(height: int, width: int, span: tuple[int, int]) -> Plan | None:
    """The plan for an image whose sides, padding included, do not change; None where it is too large."""
    if max(height, width) > MOST_ROWS:
        return None
    return Plan(height, width, height - span[0] + 1, width - span[1] + 1, 1)


def cost(plan: Plan, inputs: int, outputs: int, groups: int) -> float:
    """What one row of a batch costs, in multiplications."""
    blocks, frequencies = plan.blocks or 1, plan.half * plan.columns
    forward = inputs * (2 * plan.half * plan.rows * plan.columns + 4 * frequencies * plan.columns)
    back = outputs * (4 * frequencies * plan.kept + 2 * plan.half * plan.fresh * plan.kept)
    weights = inputs * outputs // groups
    traffic = 2 * frequencies * (blocks * 4 * (inputs + outputs) + weights)
    products = 0 if inputs == groups else groups * frequencies
    return blocks * (forward + back + 4 * frequencies * weights) + PER_NUMBER * traffic + PER_PRODUCT * products
