"""Residual blocks: the parts of a model that can be passed over, for what they answer is shaped like what they take.

A block has a path around its weights.  That is tested rather than read from the code: with every weight matrix of
the part at zero, a residual block still answers in dependence of its input, and any other part does not.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from accelerando.signature import CONSTANTS, Signature


class Call(NamedTuple):
    """What a part was called with, and what it answered."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Any

    @property
    def first(self) -> Any:
        """The first input, by position or by name."""
        return first_of(self.args, self.kwargs)


def first_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The first argument of a call, by position or by name; None where there is none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def repeated(module: Any) -> list[str]:
    """Names of parts that may be blocks by the looks of it: siblings of one class, with weight matrices."""
    names = []
    for parent_name, parent in module.named_modules():
        made = {key: m for key, m in parent.named_children() if _composed(m)}
        classes = Counter(type(m) for m in made.values())
        prefix = f"{parent_name}." if parent_name else ""
        names += [prefix + key for key, m in made.items() if classes[type(m)] > 1]
    return names


def _composed(part: Any) -> bool:
    """Whether a part is more than one of torch's own layers, and more than a norm: it has a weight matrix."""
    own = not type(part).__module__.startswith("torch.") or any(True for _ in part.children())
    return own and any(p.ndim > 1 for p in part.parameters())


def observe(module: Any, names: Iterable[str], signature: Signature, leaves: Sequence[Any]) -> dict[str, Call]:
    """Run the module once, and tell what these parts were called with, in the order in which they answered.

    Parts that were not called exactly once are left out.
    """
    import torch

    calls: list[tuple[str, Call]] = []

    def hook(name: str) -> Any:
        return lambda part, args, kwargs, answer: calls.append((name, Call(args, kwargs, answer)))

    hooks = [module.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in names]
    args, kwargs = signature.call([x if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x)) for x in leaves])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its nested tensors have no shapes, and its layers skip their parts
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in hooks:
            handle.remove()
    times = Counter(name for name, _ in calls)
    return {name: call for name, call in calls if times[name] == 1}


def blocks(module: Any, signature: Signature, leaves: Sequence[Any]) -> list[tuple[str, Any]]:
    """The residual blocks of a module, by name, in the order in which they run.

    A block is one of several siblings of a class (in a Sequential, a ModuleList or as attributes), runs once, takes
    a float tensor first and answers with one of the same shape and type, alone or first in a tuple of constants.
    Where blocks lie within each other, the innermost count.

    Args:
        leaves: flat inputs, arrays or tensors, in the signature's order; a row or two do.
    """
    copied = copy.deepcopy(module)
    calls = observe(copied, repeated(copied), signature, leaves)
    found = [n for n, c in calls.items() if _keeps_shape(c) and _goes_around(copied.get_submodule(n), c)]
    inner = [n for n in found if not any(other.startswith(f"{n}.") for other in found)]
    return [(name, module.get_submodule(name)) for name in inner]


def _keeps_shape(call: Call) -> bool:
    import torch

    first, answer = call.first, call.answer
    if isinstance(answer, tuple):
        if not answer or not all(isinstance(x, CONSTANTS) for x in answer[1:]):
            return False
        answer = answer[0]
    tensors = isinstance(first, torch.Tensor) and isinstance(answer, torch.Tensor) and first.is_floating_point()
    return tensors and first.shape == answer.shape and first.dtype == answer.dtype


def _goes_around(block: Any, call: Call) -> bool:
    """Whether the answer depends on the first input with every weight matrix at zero.  Spoils the block."""
    import torch

    with torch.no_grad():
        for parameter in block.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        one, other = (_first_tensor(_with_first(block, call, x)) for x in (call.first, -call.first))
    return not torch.equal(one, other) and bool(torch.isfinite(one).all())


def _with_first(block: Any, call: Call, first: Any) -> Any:
    if call.args:
        return block(first, *call.args[1:], **call.kwargs)
    return block(**{**call.kwargs, next(iter(call.kwargs)): first})


def _first_tensor(answer: Any) -> Any:
    return answer[0] if isinstance(answer, tuple) else answer
