"""A transformer's chain of blocks, how many tokens each is to work on, and the parts that merge them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, flatten
from accelerando.techniques._blocks import Call, blocks, first_of, observe
from accelerando.techniques._parity import first_lines
from accelerando.techniques._shapes import FAILURES, close, with_first
from accelerando.techniques._token_mergers import by_content, by_place, merging
from accelerando.workload import Model

PROBE_ROWS = 2
MOST_AHEAD = 5  # tokens read by their place before all others: a class token, a distillation token, registers


class Chain(NamedTuple):
    """Blocks by name, in the order in which they run, each from (n, tokens, width) to the same.

    The first `ahead` tokens and the last `behind` are read by their place.  Blocks that are `bare` are called with
    their tokens and nothing else.
    """

    names: tuple[str, ...]
    tokens: int
    ahead: int
    behind: int
    bare: bool = True

    @property
    def kept(self) -> int:
        return self.ahead + self.behind


def find_chain(model: Model, leaves: list[Array]) -> Chain:
    """The longest chain of blocks between which tokens can be merged.

    Raises:
        RefusalError: there is none, or its blocks are given masks, or the answer depends on every token's place.
    """
    module, few = copy.deepcopy(model.content), [x[:PROBE_ROWS] for x in leaves]
    named = blocks(module, model.signature, few)
    calls = observe(module, [name for name, _ in named], model.signature, few)
    rows = len(few[0])
    states = {n: c for n, c in calls.items() if c.first.ndim == 3 and len(c.first) == rows}
    chains = Counter((n.rpartition(".")[0], c.first.shape) for n, c in states.items())
    if not chains or chains.most_common(1)[0][1] < 2:
        raise RefusalError(
            Reason.NOTHING_TO_DO, "it has no chain of residual blocks that take and give (batch, tokens, width)"
        )
    (parent, shape), _ = chains.most_common(1)[0]
    names = tuple(n for n, c in states.items() if (n.rpartition(".")[0], c.first.shape) == (parent, shape))
    for name in names:
        _ensure_free(module.get_submodule(name), states[name], name)
    ahead, behind = _read_by_place(model, module, names[-1], few, shape[1])
    if shape[1] - ahead - behind < 2:
        raise RefusalError(Reason.NOTHING_TO_DO, f"only {shape[1]} tokens, of which {ahead + behind} must stay")
    bare = all(len(states[n].args) + len(states[n].kwargs) == 1 for n in names)
    return Chain(names, shape[1], ahead, behind, bare)


def schedule(chain: Chain, share: float) -> list[int]:
    """Tokens per block: all for the first, then fewer by one factor from block to block.

    At least `share` of the token-blocks are taken away, or as many as can be; a greater share never leaves a block
    with more tokens.
    """
    free = chain.tokens - chain.kept

    def counts(factor: float) -> list[int]:
        return [chain.kept + max(1, round(free * factor**i)) for i in range(len(chain.names))]

    total = chain.tokens * len(chain.names)
    most = total - max(share * total, 1)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= most else (low, middle)
    return counts(low)


def merged(model: Model, leaves: list[Array], chain: Chain, counts: list[int], by: str) -> Any:
    """A copy of the module whose blocks work on `counts` tokens, fitted to the inputs in one pass."""
    import torch

    module = copy.deepcopy(model.content)
    mergers: dict[str, Any] = {}

    def hook(name: str, after: int) -> Any:
        def cut(block: Any, args: Any, kwargs: Any) -> Any:
            states = first_of(args, kwargs)
            ends, before = (chain.ahead, chain.behind), list(mergers.values())
            if by == "content":
                mergers[name] = by_content(states.shape[1], after, ends)
            else:
                mergers[name] = by_place(states, after, before[-1].sizes if before else torch.ones(chain.tokens), ends)
            return with_first(args, kwargs, mergers[name](states))

        return cut

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(hook(name, after), with_kwargs=True)
        for name, before, after in zip(chain.names[1:], counts[:-1], counts[1:], strict=True)
        if after < before
    ]
    args, kwargs = model.signature.call([torch.from_numpy(x) for x in leaves])
    try:
        wanted = _answer(module, args, kwargs)
    except FAILURES as error:
        raise RefusalError(
            Reason.UNSUPPORTED, f"its code needs every token after its blocks: {first_lines(error)}"
        ) from error
    finally:
        for handle in hooks:
            handle.remove()
    for put in (_insert, _wrap) if chain.bare else (_wrap,):
        made = copy.deepcopy(model.content)
        try:
            put(made, mergers, chain)
            if all(close(want, have) for want, have in zip(wanted, _answer(made, args, kwargs), strict=True)):
                return made
        except FAILURES:
            continue
    raise RefusalError(Reason.UNSUPPORTED, "its code looks into its blocks, so that nothing can be put between them")


def _insert(module: Any, mergers: dict[str, Any], chain: Chain) -> None:
    """Put each merger before its block in the container that both are in: blocks stay blocks for other techniques."""
    for name in reversed(mergers):
        parent, _, key = name.rpartition(".")
        module.get_submodule(parent).insert(int(key), mergers[name])


def _wrap(module: Any, mergers: dict[str, Any], chain: Chain) -> None:
    """Put the blocks from the first merger on into parts that merge first and keep masks of another size away."""
    import torch

    for name in chain.names[chain.names.index(next(iter(mergers))) :]:
        parent, _, key = name.rpartition(".")
        merge = mergers.get(name, torch.nn.Identity())
        module.get_submodule(parent)._modules[key] = merging()(merge, module.get_submodule(name))


def _ensure_free(block: Any, call: Call, name: str) -> None:
    """Refuse a block that is given more than its tokens, or that is made for one number of them."""
    import torch

    others = [*call.args[1:], *call.kwargs.values()] if call.args else list(call.kwargs.values())[1:]
    if any(isinstance(x, torch.Tensor) for other in others for x in _flat(other)):
        raise RefusalError(
            Reason.UNSUPPORTED, f"{name} is given a mask or positions besides its tokens, which would have to merge too"
        )
    args, kwargs = with_first(call.args, call.kwargs, call.first[:, :-1])
    try:
        with torch.no_grad():
            answer = block(*args, **kwargs)
    except FAILURES as error:
        why = f"{name} takes one number of tokens only: {first_lines(error)}"
        raise RefusalError(Reason.UNSUPPORTED, why) from error
    answer = answer[0] if isinstance(answer, tuple) else answer
    if answer.shape != call.first[:, :-1].shape:
        raise RefusalError(Reason.UNSUPPORTED, f"{name} answers {tuple(answer.shape)} for one token less")


def _read_by_place(model: Model, module: Any, last: str, leaves: list[Array], tokens: int) -> tuple[int, int]:
    """How many tokens at either end are told apart by what follows the last block: turning the others has no effect.

    Raises:
        RefusalError: all are.
    """
    import torch

    signature = model.signature
    args, kwargs = signature.call([torch.from_numpy(x) for x in leaves])

    def turned(ahead: int, behind: int) -> Any:
        def turn(block: Any, given: Any, states: Any) -> Any:
            whole = states[0] if isinstance(states, tuple) else states
            end = tokens - behind
            parts = [whole[:, :ahead], whole[:, ahead:end].roll(1, 1), whole[:, end:]]
            whole = torch.cat(parts, 1)
            return (whole, *states[1:]) if isinstance(states, tuple) else whole

        return turn

    plain = _answer(module, args, kwargs)
    ends = [(0, 0), (1, 0), (0, 1), (1, 1), *((n, 0) for n in range(2, MOST_AHEAD + 1))]
    for ahead, behind in ends:
        if tokens - ahead - behind < 2:
            continue
        handle = module.get_submodule(last).register_forward_hook(turned(ahead, behind))
        try:
            got = _answer(module, args, kwargs)
        finally:
            handle.remove()
        if all(close(want, have) for want, have in zip(plain, got, strict=True)):
            return ahead, behind
    raise RefusalError(
        Reason.UNSUPPORTED, "it answers per token, or reads its tokens by their place: none can be merged with another"
    )


def _answer(module: Any, args: Any, kwargs: Any) -> list[Any]:
    import torch

    with torch.no_grad():
        return flatten(module(*args, **kwargs))[0]


def _flat(value: Any) -> list[Any]:
    return [x for item in value for x in _flat(item)] if isinstance(value, (tuple, list)) else [value]
