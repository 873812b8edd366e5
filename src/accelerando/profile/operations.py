"""What a torch module computes: FLOPs, bytes and live memory of every operation, counted in one call.

A dispatch mode sees each operation that reaches a kernel; hooks on the modules say whose it is.  The formulas are
those of `torch.utils.flop_counter`, and those below for what it leaves out: two FLOPs per multiplication with
addition; FFT by the customary 5 n log2 n, half for real ones (Frigo & Johnson, *Proceedings of the IEEE* 93, 2005).
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Formula = Callable[..., int]

# Operation -> what it does; the one with most FLOPs names the layer's family.
FAMILIES = {
    "convolution": "convolution", "_convolution": "convolution", "mkldnn_convolution": "convolution",
    "addmm": "linear", "mm": "linear", "mv": "linear", "addmv": "linear", "_addmm_activation": "linear",
    "_int_mm": "linear", "bmm": "matmul", "baddbmm": "matmul", "dot": "matmul",
    "mkldnn_rnn_layer": "recurrent", "_fft_r2c": "fft", "_fft_c2r": "fft", "_fft_c2c": "fft",
    "embedding": "embedding", "_embedding_bag": "embedding",
    "native_layer_norm": "normalization", "native_batch_norm": "normalization",
    "_native_batch_norm_legit_no_training": "normalization", "native_group_norm": "normalization",
}  # fmt: skip
RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")  # a GRU runs as many small products
GATHERS = ("embedding", "_embedding_bag", "index_select", "gather", "index", "take")  # they read what they look up
ALLOCATES = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")  # moves nothing


@dataclass
class Tally:
    """What one module did in one call of the model, its children apart."""

    calls: int = 0
    operations: int = 0
    flops: int = 0
    activation_bytes: int = 0
    weight_reads: int = 0
    peak_bytes: int = 0
    kernel: int = 0
    int8: bool = False
    weights: dict[int, int] = field(default_factory=dict)  # address -> bytes
    families: Counter[str] = field(default_factory=Counter)


@dataclass
class _Call:
    """One call of one module while it runs."""

    tally: Tally
    leaf: bool
    live_before: int
    operations: int = 0
    weights: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Count:
    """All modules of one call: by path, and what they have in common."""

    tallies: dict[str, Tally]
    peak_bytes: int
    weight_bytes: int
    unknown: tuple[str, ...]  # operations that read a matrix of weights and have no formula


def count(module: Any, call: Callable[[], Any]) -> Count:
    """Call a module once and count; its hooks are taken off again, also after an error."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    ledger = _Ledger(module)

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func._overloadpacket not in ledger.formulas and func is not torch.ops.prim.device.default:
                with self:  # under inference mode composite operations arrive whole
                    parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
            out = func(*args, **kwargs)
            ledger.operation(func, args, kwargs, out)
            return out

    handles: list[Any] = []
    try:
        for name, part in module.named_modules():
            leaf = not any(True for _ in part.children())
            handles.append(part.register_forward_pre_hook(ledger.enter(name, leaf), prepend=True))
            handles.append(part.register_forward_hook(ledger.leave, with_kwargs=True))
        with torch.no_grad(), Mode():  # type: ignore[no-untyped-call]
            call()
    finally:
        for handle in handles:
            handle.remove()
    return Count(ledger.tallies, ledger.peak, sum(ledger.owned.values()), tuple(sorted(ledger.unknown)))


class _Ledger:
    """Books every operation on the module that runs it."""

    def __init__(self, module: Any) -> None:
        self.formulas = formulas()
        self.tallies: dict[str, Tally] = {}
        self.stack: list[_Call] = []
        tensors = list(_tensors([*module.parameters(), *module.buffers()]))
        self.owned = {_address(t): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        self.alive: set[int] = set()
        self.live = self.peak = 0
        self.unknown: set[str] = set()

    def enter(self, name: str, leaf: bool) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            tally = self.tallies.setdefault(name, Tally())
            tally.calls += 1
            self.stack.append(_Call(tally, leaf, self.live))

        return hook

    def leave(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        call = self.stack.pop()
        call.tally.weight_reads += sum(call.weights.values())
        if call.leaf and call.operations:
            call.tally.activation_bytes += sum(map(_bytes, _tensors((args, kwargs, out))))

    def operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
        self._remember(outputs)
        name = func._overloadpacket.__name__
        read = {_address(t) for t in inputs if t.numel()}
        view = not func._schema.is_mutable and any(_address(t) in read for t in outputs if t.numel())
        if view or not self.stack or name in ALLOCATES:
            return
        call = self.stack[-1]
        tally = call.tally
        tally.peak_bytes = max(tally.peak_bytes, self.live - call.live_before)
        call.operations += 1
        tally.operations += 1
        gathers = name in GATHERS
        for tensor in inputs:
            address = _address(tensor)
            if address not in self.owned:
                tally.activation_bytes += 0 if call.leaf else _bytes(tensor)
            else:
                tally.weights[address] = self.owned[address]
                if not gathers:
                    call.weights[address] = min(self.owned[address], _bytes(tensor))
        if gathers and any(_address(t) in self.owned for t in inputs):
            tally.weight_reads += sum(map(_bytes, outputs))
        tally.activation_bytes += 0 if call.leaf else sum(map(_bytes, outputs))
        self._products(func, name, args, kwargs, out, inputs)

    def _products(self, func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: list[Any]) -> None:
        import torch

        tally = self.stack[-1].tally
        formula = self.formulas.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        tally.flops += flops
        family = FAMILIES.get(name, "attention" if "attention" in name else "pointwise")
        tally.families[family] += max(flops, 1)
        if family == "convolution":
            tally.kernel = max(tally.kernel, math.prod(args[1].shape[2:]))
        tally.int8 |= name == "_int_mm" or "qlinear" in name or "qconv" in name
        matrix = any(t.dim() > 1 and _address(t) in self.owned for t in inputs)
        known = formula or name in GATHERS or family == "normalization" or torch.Tag.pointwise in func.tags
        if matrix and not known and name not in ("clone", "copy_", "_to_copy", "cat", "stack", "repeat"):
            self.unknown.add(name)

    def _remember(self, outputs: list[Any]) -> None:
        for tensor in outputs:
            storage, address = tensor.untyped_storage(), _address(tensor)
            if not tensor.numel() or address in self.alive or address in self.owned:
                continue
            self.alive.add(address)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, address, storage.nbytes()).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.live -= size


def formulas() -> dict[Any, Formula]:
    """FLOPs of operations, called as the operation with `out_val=` its result."""
    import torch
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten

    def fft(complex_side: Callable[[Any, Any], Any], factor: float) -> Formula:
        def formula(x: Any, dims: Any, *_: Any, out_val: Any, **__: Any) -> int:
            side = complex_side(x, out_val)
            length = math.prod(side.shape[d] for d in dims)
            return round(factor * side.numel() * math.log2(max(length, 2)))

        return formula

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        *lead, rows, width = query.shape  # scores, then the weighted values
        return 2 * math.prod(lead) * rows * key.shape[-2] * (width + value.shape[-1])

    def multihead(query: Any, key: Any, value: Any, width: int, heads: int, w_in: Any, b_in: Any, w_out: Any,
                  *_: Any, **__: Any) -> int:  # fmt: skip
        rows, length, _width = query.shape  # torch takes this path for self-attention only
        return 2 * rows * length * (w_in.numel() + w_out.numel() + 2 * length * width)

    def recurrent(x: Any, w_in: Any, w_hidden: Any, *_: Any, **__: Any) -> int:
        return 2 * x.shape[0] * x.shape[1] * (w_in.numel() + w_hidden.numel())  # x: (steps, rows, features)

    ours: dict[Any, Formula] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_attention_math: attention,
        aten._native_multi_head_attention: multihead,
        aten.mkldnn_rnn_layer: recurrent,
        aten.mv: lambda a, b, **_: 2 * a.numel(),
        aten.addmv: lambda c, a, b, **_: 2 * a.numel(),
        aten.dot: lambda a, b, **_: 2 * a.numel(),
        aten._addmm_activation: lambda c, a, b, **_: 2 * a.numel() * b.shape[-1],
        aten._int_mm: lambda a, b, **_: 2 * a.numel() * b.shape[-1],
        aten._fft_r2c: fft(lambda x, out: x, 2.5),
        aten._fft_c2r: fft(lambda x, out: out, 2.5),
        aten._fft_c2c: fft(lambda x, out: x, 5.0),
    }
    return {**flop_registry, **ours}


def _tensors(value: Any) -> Iterator[Any]:
    """Every dense tensor in a value, containers opened."""
    if hasattr(value, "untyped_storage"):
        if str(value.layout) == "torch.strided":  # sparse ones have no storage of their own to look at
            yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _address(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor's own numbers; an expanded one has no more than its storage."""
    return int(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()))
