"""Parts that merge tokens, (n, before, width) to (n, after, width), and how they are fitted to calibration data.

`ends` are the numbers of tokens at the front and at the back that stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from accelerando.techniques._blocks import first_of
from accelerando.techniques._shapes import with_first


def by_place(states: Any, after: int, sizes: Any, ends: tuple[int, int]) -> Any:
    """Merge the places whose states are most alike on these rows: Ward's clusters, in order of their first place."""
    import numpy as np
    import torch
    from scipy.cluster.hierarchy import cut_tree, linkage
    from scipy.spatial.distance import squareform

    before, ahead = states.shape[1], ends[0]
    inner = states[:, ahead : before - ends[1]].detach().double()
    points = inner.transpose(0, 1).reshape(inner.shape[1], -1)
    gaps = torch.cdist(points[None], points[None])[0].numpy()
    tree = linkage(squareform(gaps, checks=False), method="ward")
    found = cut_tree(tree, n_clusters=after - sum(ends))[:, 0]
    _, first, numbered = np.unique(found, return_index=True, return_inverse=True)
    places = torch.from_numpy(np.argsort(np.argsort(first))[numbered])
    at = torch.arange(before)
    at[ahead : ahead + len(places)] = ahead + places
    at[ahead + len(places) :] -= before - after
    matrix = torch.zeros(after, before)
    matrix[at, torch.arange(before)] = sizes
    merged_sizes = matrix.sum(1)
    return _place_merger()((matrix / merged_sizes[:, None]).to(states.dtype), merged_sizes)


@cache
def _place_merger() -> Any:
    import torch

    class MergePlaces(torch.nn.Module):
        """(n, before, width) -> (n, after, width): the mean of fixed groups of tokens."""

        matrix: torch.Tensor

        def __init__(self, matrix: Any, sizes: Any) -> None:
            super().__init__()
            self.register_buffer("matrix", matrix)  # a buffer: whoever cuts channels must not take it for weights
            self.register_buffer("sizes", sizes, persistent=False)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.matmul(self.matrix, first_of(args, kwargs))

        def extra_repr(self) -> str:
            return f"{self.matrix.shape[1]} -> {self.matrix.shape[0]} tokens"

    return MergePlaces


def by_content(before: int, after: int, ends: tuple[int, int]) -> Any:
    """Merge as many pairs per round as it takes; a round at most halves the tokens."""
    rounds, free, wanted = [], before - sum(ends), after - sum(ends)
    while free > wanted:
        now = max(wanted, free // 2)
        rounds.append(free - now)
        free = now
    return _content_merger()(ends, tuple(rounds))


@cache
def _content_merger() -> Any:
    import torch

    class MergeAlike(torch.nn.Module):
        """(n, before, width) -> (n, after, width): every second token may join the most similar of the others.

        Bolya et al., "Token Merging", section 3.  In each round the most similar pairs are merged, as many as it says.
        """

        def __init__(self, ends: tuple[int, int], rounds: tuple[int, ...]) -> None:
            super().__init__()
            self.ends, self.rounds = ends, rounds

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            states = first_of(args, kwargs)
            ahead, end = self.ends[0], states.shape[1] - self.ends[1]
            inner = states[:, ahead:end]
            for count in self.rounds:
                inner = self.once(inner, count)
            return torch.cat([states[:, :ahead], inner, states[:, end:]], 1) if any(self.ends) else inner

        def once(self, states: Any, count: int) -> Any:
            direction = states / states.norm(dim=-1, keepdim=True).clamp_min(1e-6)
            near, mate = torch.matmul(direction[:, ::2], direction[:, 1::2].transpose(1, 2)).max(-1)
            source, target = states[:, ::2], states[:, 1::2]
            order = near.topk(source.shape[1], dim=-1).indices
            gone, stays = order[:, :count], order[:, count:]
            joins = (mate.gather(1, gone)[..., None] == torch.arange(target.shape[1])).to(states.dtype)
            wide = (-1, -1, states.shape[2])
            moved = source.gather(1, gone[..., None].expand(*wide))
            total = target + torch.matmul(joins.transpose(1, 2), moved)
            target = total / (1 + joins.sum(1))[..., None]
            return torch.cat([source.gather(1, stays[..., None].expand(*wide)), target], 1)

        def extra_repr(self) -> str:
            return f"{sum(self.rounds)} tokens fewer"

    return MergeAlike


@cache
def merging() -> Any:
    import torch

    class Merging(torch.nn.Module):
        """A block that merges its tokens first.

        It was given no other tensors; one that comes all the same is a mask over all the tokens that there were, which
        lets everything pass: some models make it only while they are exported.
        """

        def __init__(self, merge: Any, block: Any) -> None:
            super().__init__()
            self.merge, self.block = merge, block

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            states = self.merge(first_of(args, kwargs))
            args = tuple(None if isinstance(x, torch.Tensor) else x for x in args)
            kwargs = {k: None if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}
            args, kwargs = with_first(args, kwargs, states)
            return self.block(*args, **kwargs)

    return Merging
