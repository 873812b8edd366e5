"""Which units go: the least important, in blocks that leave widths which vector units like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from accelerando.techniques._prune_groups import Group

Scores = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Block:
    """Units of one group that go at once, and how much they matter per channel."""

    group: int
    units: tuple[int, ...]
    channels: int
    score: float


def pick(groups: Sequence[Group], scores: Scores, share: float, everywhere: bool) -> dict[int, list[int]]:
    """The units to take away, by number of the group; each group keeps at least the least of its `widths`.

    What goes for a share goes for any larger one too, and at least one block goes for any share.

    Args:
        share: of all channels of the groups.
        everywhere: rank the blocks of all groups together; if not, about the same share goes of each group.
    """
    blocks = [_blocks(i, group, scores[i]) for i, group in enumerate(groups)]
    if everywhere:
        ranked = sorted((block for of_group in blocks for block in of_group), key=lambda block: block.score)
        gone = _until(share * sum(group.channels for group in groups), ranked)
    else:
        gone = [b for group, ranked in zip(groups, blocks, strict=True) for b in _until(share * group.channels, ranked)]
    picked: dict[int, list[int]] = {}
    for block in gone:
        picked.setdefault(block.group, []).extend(block.units)
    return {i: sorted(units) for i, units in sorted(picked.items())}


def _until(channels: float, blocks: Sequence[Block]) -> list[Block]:
    """The first blocks that together hold this many channels."""
    held = [0, *accumulate(block.channels for block in blocks)]
    return [block for block, before in zip(blocks, held, strict=False) if before < channels]


def _blocks(number: int, group: Group, scores: Sequence[float]) -> list[Block]:
    """What a group can lose, the least important first; each block that goes leaves one of its `widths`."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    size = len(group.units[0])
    if group.heads:
        kept = list(range(len(order) - 1, 0, -1))
    else:
        widths_in_units = (w * group.layers // size for w in widths(group.channels // group.layers))
        kept = sorted({n for n in widths_in_units if 0 < n < len(order)}, reverse=True) or [1]
    ends = [len(order) - n for n in kept]
    parts = [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return [
        Block(number, tuple(part), size * len(part), sum(scores[i] for i in part) / len(part)) for part in parts if part
    ]


def widths(width: int) -> list[int]:
    """The smaller widths that are worth having, descending.

    A convolution of 56 channels takes as long as one of 64 where 16 numbers fit a register, and one of 12 as long as
    one of 16: multiples of 16 for wide layers, of 8 and 4 for narrow ones, and the halves below the last multiple.
    """
    step = next((s for s in (16, 8, 4) if width >= 2 * s), 1)
    multiples = range((width - 1) // step * step, 0, -step)
    return [*multiples, *(step // part for part in (2, 4) if step >= part)]
