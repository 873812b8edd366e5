"""The layers of a torch module: timed by hooks, counted by `operations`."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from accelerando.interval import Floats, Interval, median_interval
from accelerando.profile.layers import Layer, Look, call_seconds, covered_share, disturbance, layer_medians, rows_of
from accelerando.profile.operations import RECURRENT, Count, Tally, count
from accelerando.workload import Model, Samples

FUSED = ", and a fused path of torch's own (as in nn.TransformerEncoder) is off while they are timed"
ROUNDS = 3  # blocks of calls with and without hooks, in turn, so that a drifting machine touches both


class Modules:
    """A model in the form TORCH.  Its module is only called: hooks are put on and taken off again."""

    def __init__(self, model: Model, samples: Samples) -> None:
        compiled = getattr(model.content, "_orig_mod", None)
        self.module = model.content if compiled is None else compiled  # a compiled module hides its layers
        self.model, self.samples = model, samples

    def call(self, batch: int) -> Callable[[], Any]:
        import torch

        args, kwargs = self.model.signature.call([torch.from_numpy(x) for x in rows_of(self.samples, batch)])

        def run() -> Any:
            with torch.no_grad():
                return self.module(*args, **kwargs)

        return run

    def peak_bytes(self, batch: int) -> int:
        return count(self.module, self.call(batch)).peak_bytes

    def look(self, batch: int, seconds: float) -> Look:
        import torch

        call = self.call(batch)
        counted = count(self.module, call)
        names = [name for name, part in self.module.named_modules() if _is_layer(part, counted.tallies.get(name))]
        whole, total, by_layer = self._times(call, names, seconds)
        parts = dict(self.module.named_modules())
        layers = [
            _layer(name, parts[name], counted.tallies[name], interval)
            for name, interval in zip(names, layer_medians(by_layer), strict=True)
        ]
        timed, plain = median_interval(total), median_interval(whole)
        notes = disturbance(timed, plain, len(layers), FUSED)
        return Look(
            tuple(layers), plain, timed, covered_share(by_layer, total), torch.get_num_threads(),
            counted.weight_bytes, counted.peak_bytes, (*notes, *_notes(counted)),
        )  # fmt: skip

    def _times(self, call: Callable[[], Any], names: list[str], seconds: float) -> tuple[Floats, Floats, Floats]:
        """Seconds of whole calls (n,), of timed calls (m,), and of their layers (m, layers)."""
        whole, total, rows = [], [], []
        watch = _Stopwatch(self.module, names)
        for _ in range(ROUNDS):
            whole.append(call_seconds(call, 0.3 * seconds / ROUNDS))
            with watch:
                total.append(call_seconds(call, 0.7 * seconds / ROUNDS))
            rows += watch.runs[1:]  # `call_seconds` does not count its first call, so neither do we
            watch.runs.clear()
        return np.concatenate(whole), np.concatenate(total), np.array(rows).reshape(-1, len(names))


class _Stopwatch:
    """Times every module's own part of a call, children apart, in one row per call of the model."""

    def __init__(self, module: Any, names: list[str]) -> None:
        self.module, self.columns = module, {name: i for i, name in enumerate(names)}
        self.runs: list[list[float]] = []
        self._starts: list[float] = []
        self._inner: list[float] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Stopwatch:
        for name, part in self.module.named_modules():
            column = self.columns.get(name)
            self._handles.append(part.register_forward_pre_hook(self._before))
            self._handles.append(part.register_forward_hook(self._after(column)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._starts.clear()
        self._inner.clear()

    def _before(self, module: Any, args: Any) -> None:
        if not self._starts:
            self.runs.append([0.0] * len(self.columns))
        self._inner.append(0.0)
        self._starts.append(perf_counter())

    def _after(self, column: int | None) -> Callable[..., None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            took = perf_counter() - self._starts.pop()
            own = took - self._inner.pop()
            if self._inner:
                self._inner[-1] += took
            if column is not None:
                self.runs[-1][column] += own

        return hook


def _is_layer(module: Any, tally: Tally | None) -> bool:
    """A module that was called and has no children, or that computes something of its own between them."""
    return tally is not None and (tally.operations > 0 or not any(True for _ in module.children()))


def _layer(name: str, module: Any, tally: Tally, seconds: Interval) -> Layer:
    kind = type(module).__name__
    family = max(tally.families, key=lambda f: tally.families[f]) if tally.families else "view"
    return Layer(
        name=name or "(the model itself)",
        kind=kind,
        family="recurrent" if kind in RECURRENT else family,
        precision="int8" if tally.int8 else "float32",
        calls=tally.calls,
        operations=tally.operations,
        seconds=seconds,
        flops=tally.flops,
        weight_bytes=sum(tally.weights.values()),
        activation_bytes=tally.activation_bytes,
        moved_bytes=tally.activation_bytes + tally.weight_reads,
        peak_bytes=tally.peak_bytes,
        kernel=tally.kernel,
        container=any(True for _ in module.children()),
    )


def _notes(counted: Count) -> list[str]:
    if not counted.unknown:
        return []
    return [f"no formula is known for {', '.join(counted.unknown)}: its FLOPs are not counted"]
