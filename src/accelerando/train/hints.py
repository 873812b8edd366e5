"""Hidden states: a student's blocks learn to answer like the teacher's (FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerando.errors import Reason, RefusalError


class Hints:
    """The blocks of a student and of its teacher that correspond.

    Blocks are the parts of a chain (a Sequential or a ModuleList) that has the same name in both.  Where it has as many
    parts in both, those of one name correspond; where the student has fewer, each stands for as many of the teacher's,
    so that the last corresponds to the last.  Only blocks that answer in the same shape count.

    Args:
        call: (module, inputs) calls either of them.
        inputs: some rows, to see the shapes of answers.

    Raises:
        RefusalError: NOTHING_TO_DO: no block corresponds, for the cut went through all of them.
    """

    def __init__(
        self, student: Any, teacher: Any, call: Callable[[Any, Sequence[Any]], Any], inputs: Sequence[Any]
    ) -> None:
        import torch

        self._student, self._teacher, self._call = student, teacher, call
        self._pairs = _pairs(student, teacher)
        with torch.no_grad(), self.listening() as heard:
            call(student, inputs)
        theirs = self._asked(inputs)
        self._pairs = {
            mine: other
            for mine, other in self._pairs.items()
            if mine in heard and other in theirs and heard[mine].shape == theirs[other].shape
        }
        if not self._pairs:
            raise RefusalError(
                Reason.NOTHING_TO_DO,
                "none of its blocks answers in the shape of one of the original's, so there are no hidden states to "
                "compare; use features=0",
            )

    @contextmanager
    def listening(self) -> Iterator[dict[str, Any]]:
        """What the student's blocks answer meanwhile, by name."""
        with _heard(self._student, self._pairs) as heard:
            yield heard

    def distance(self, heard: dict[str, Any], inputs: Sequence[Any]) -> Any:
        """How far the student's hidden states are from the teacher's for the same inputs: a scalar tensor.

        The mean over blocks of the mean squared difference, every row normalized to mean 0 and variance 1, so that
        layers of any scale count alike.
        """
        theirs = self._asked(inputs)
        gaps = [
            (_normalized(heard[mine]) - _normalized(theirs[other])).square().mean()
            for mine, other in self._pairs.items()
        ]
        return sum(gaps) / len(gaps)

    def _asked(self, inputs: Sequence[Any]) -> dict[str, Any]:
        import torch

        with torch.no_grad(), _heard(self._teacher, self._pairs.values()) as heard:
            self._call(self._teacher, inputs)
        return heard


def _pairs(student: Any, teacher: Any) -> dict[str, str]:
    """The teacher's block for each of the student's, by name."""
    theirs, found = dict(teacher.named_modules()), {}
    for name, chain in student.named_modules():
        there = theirs.get(name)
        if there is None or not (_is_chain(chain) and _is_chain(there)):
            continue
        mine, others = list(chain._modules), list(there._modules)
        if len(mine) > len(others):
            continue
        for i, key in enumerate(mine):
            other = key if len(mine) == len(others) else others[(i + 1) * len(others) // len(mine) - 1]
            parts = chain._modules[key], there._modules.get(other)
            if all(map(_is_block, parts)):
                found[f"{name}.{key}" if name else key] = f"{name}.{other}" if name else other
    return found


def _is_chain(module: Any) -> bool:
    from torch import nn

    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _is_block(module: Any) -> bool:
    """Whether it is made of parts, and learns: not a single layer, nor what stands in for a block that was left out."""
    return module is not None and any(True for _ in module.children()) and any(True for _ in module.parameters())


@contextmanager
def _heard(module: Any, names: Any) -> Iterator[dict[str, Any]]:
    """What these parts of a module answer meanwhile: tensors of floats, the first of a tuple."""
    heard: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def hear(part: Any, args: Any, answer: Any) -> None:
            first = answer[0] if isinstance(answer, tuple) and answer else answer
            if hasattr(first, "is_floating_point") and first.is_floating_point() and first.dim() > 1:
                heard[name] = first

        return hear

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _normalized(x: Any) -> Any:
    from torch.nn import functional

    return functional.layer_norm(x.float(), x.shape[1:])
