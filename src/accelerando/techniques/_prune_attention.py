"""Attention that can have fewer heads than its width holds: what `torch.nn.MultiheadAttention` is turned into.

`MultiheadAttention` ties the width of all heads together to the width of its input, so that no head can be taken
away; and its weights lie in one block that a dependency graph can't follow.
"""

from __future__ import annotations

from functools import cache
from typing import Any


def free_heads(model: Any) -> Any:
    """The model with each `MultiheadAttention` replaced by the same function in separate projections.

    Changes `model` in place and returns it, or its replacement.  One that adds keys of its own (`add_bias_kv`,
    `add_zero_attn`) stays as it is.
    """
    from torch import nn

    def free(module: Any) -> bool:
        return type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn

    if free(model):
        return attention_of(model)
    made: dict[Any, Any] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if free(child):
                if child not in made:  # one module may stand in several places
                    made[child] = attention_of(child)
                setattr(parent, name, made[child])
    return model


def attention_of(original: Any) -> Any:
    """A module that computes what this `torch.nn.MultiheadAttention` does, with projections `q`, `k`, `v`, `out`."""
    made = _attention_class()(original.num_heads, original.head_dim, original.batch_first, original.dropout)
    if original._qkv_same_embed_dim:
        weights = original.in_proj_weight.detach().chunk(3)
    else:
        weights = tuple(getattr(original, f"{kind}_proj_weight").detach() for kind in "qkv")
    biases = (None,) * 3 if original.in_proj_bias is None else original.in_proj_bias.detach().chunk(3)
    for kind, weight, bias in zip("qkv", weights, biases, strict=True):
        setattr(made, kind, _linear(weight, bias))
    made.out = _linear(original.out_proj.weight, original.out_proj.bias)
    return made.requires_grad_(original.out_proj.weight.requires_grad).train(original.training)


def _linear(weight: Any, bias: Any) -> Any:
    from torch import nn

    size = weight.shape[1], weight.shape[0], bias is not None
    made = nn.utils.skip_init(nn.Linear, *size, dtype=weight.dtype)  # type: ignore[no-untyped-call]
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


@cache
def _attention_class() -> type[Any]:
    import torch
    from torch import nn

    class HeadedAttention(nn.Module):
        """Multi-head attention (Vaswani et al. 2017) whose heads are as wide as they are, however few are left.

        Takes and gives what `torch.nn.MultiheadAttention` does.
        """

        q: nn.Module
        k: nn.Module
        v: nn.Module
        out: nn.Module
        in_proj_bias = in_proj_weight = None  # so that torch's encoder layers do not take their fused way
        _qkv_same_embed_dim = False

        def __init__(self, num_heads: int, head_dim: int, batch_first: bool, dropout: float) -> None:
            super().__init__()
            self.num_heads, self.head_dim = num_heads, head_dim
            self.batch_first, self.dropout = batch_first, dropout

        def forward(
            self,
            query: Any,
            key: Any,
            value: Any,
            key_padding_mask: Any = None,
            need_weights: bool = True,
            attn_mask: Any = None,
            average_attn_weights: bool = True,
            is_causal: bool = False,  # a hint; the mask says it all
        ) -> tuple[Any, Any]:
            single = query.dim() == 2  # no batch
            if single:
                query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
                key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            if not self.batch_first:
                query, key, value = (x.transpose(0, 1) for x in (query, key, value))
            q, k, v = self._split(self.q(query)), self._split(self.k(key)), self._split(self.v(value))
            mask = self._mask(q, key_padding_mask, attn_mask)
            dropout = self.dropout if self.training else 0.0
            if need_weights:
                scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
                weights = (scores if mask is None else scores + mask).softmax(-1)
                seen = nn.functional.dropout(weights, dropout) @ v
                weights = weights.mean(1) if average_attn_weights else weights
                weights = weights.squeeze(0) if single else weights
            else:
                seen, weights = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout), None
            answer = self.out(seen.transpose(1, 2).flatten(2))
            if single:
                return answer.squeeze(0), weights
            return answer if self.batch_first else answer.transpose(0, 1), weights

        def _split(self, x: Any) -> Any:
            """(n, tokens, heads * width) -> (n, heads, tokens, width)."""
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        def _mask(self, q: Any, padding: Any, mask: Any) -> Any:
            """What to add to the scores, or None; in masks of booleans, true means: do not look."""
            parts = []
            if mask is not None:
                per_head = mask.dim() == 3
                parts.append(mask.unflatten(0, (len(q), self.num_heads)) if per_head else mask)
            if padding is not None:
                parts.append(padding[:, None, None, :])
            floats = [
                q.new_zeros(m.shape).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(q.dtype)
                for m in parts
            ]
            return sum(floats[1:], floats[0]) if floats else None

    return HeadedAttention
