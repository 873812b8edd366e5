"""The contestants: every single tool at its documented defaults, each in a process of its own, taking turns with ours.

Each peer gets the same module, the same calibration rows (where it calibrates) and the same inputs.  Torch peers are
given tensors, so that they pay for no conversion.  A round is one short block of every contestant, in random order;
figures are ratios within a round.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.errors import RefusalError
from accelerando.interval import Floats, Interval, median_interval, paired_bootstrap
from accelerando.measure.arm import Arm, timed_batches
from accelerando.measure.child import Child
from accelerando.measure.clock import settle_on, time_block
from accelerando.metric import Metric
from accelerando.signature import Signature, flatten, to_numpy
from accelerando.workload import Form, Model, Samples, flat_module

PREPARE_SECONDS = 400.0
Answer = Callable[[Sequence[Any]], Any]


# --- each tool, as its documentation has it; run in the child ---------------------------------------------------------


def eager(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    import torch

    flat = flat_module(model)

    def answer(leaves: Sequence[Any]) -> Any:
        with torch.inference_mode():
            return flat(*leaves)

    return answer


def torch_compile(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    import torch

    compiled = torch.compile(flat_module(model))

    def answer(leaves: Sequence[Any]) -> Any:
        with torch.inference_mode():
            return compiled(*leaves)

    return answer


def export(model: Model, folder: Path) -> Path:
    """The .onnx file as torch.onnx.export gives it, with a dynamic batch."""
    import torch

    path = folder / "model.onnx"
    if path.exists():
        return path
    ports, rows = model.signature.inputs, 2
    example = tuple(torch.from_numpy(_example(p, rows)) for p in ports)
    dims: dict[str, Any] = {}
    shapes = []
    for port in ports:
        named = {i: a for i, a in enumerate(port.shape) if isinstance(a, str)}
        shapes.append({i: dims.setdefault(a, torch.export.Dim(a, min=1, max=4096)) for i, a in named.items()})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        names, answers = [p.name for p in ports], [p.name for p in model.signature.outputs]
        torch.onnx.export(
            flat_module(model), example, str(path), dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=(tuple(shapes),), input_names=names, output_names=answers,
        )  # fmt: skip
    return path


def _example(port: Any, rows: int) -> np.ndarray:
    shape = [rows if a == "batch" else 16 if isinstance(a, str) else a for a in port.shape]
    rng = np.random.default_rng(0)
    if port.dtype.startswith("int"):
        return rng.integers(0, 2, shape).astype(port.dtype)
    return rng.standard_normal(shape).astype(port.dtype)


def _session(path: Path, model: Model, threads: int = 0) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [p.name for p in model.signature.inputs]
    return lambda leaves: session.run(None, dict(zip(names, leaves, strict=True)))


def ort_1_thread(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    return _session(export(model, folder), model, 1)


def ort(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    return _session(export(model, folder), model)


def ort_int8(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            names = [p.name for p in model.signature.inputs]
            self.rows = iter([dict(zip(names, c.inputs, strict=True)) for c in calibrate.take(128).batches(8)])

        def get_next(self) -> Any:
            return next(self.rows, None)

    source, ready, made = export(model, folder), folder / "ready.onnx", folder / "int8.onnx"
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantize_static(str(ready), str(made), Reader())
    return _session(made, model)


def openvino(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    import openvino as ov

    return _compiled(ov.convert_model(str(export(model, folder))))


def nncf_int8(model: Model, calibrate: Samples, folder: Path, batch: int) -> Answer:
    import nncf
    import openvino as ov

    rows = [
        dict(zip([p.name for p in model.signature.inputs], c.inputs, strict=True))
        for c in calibrate.take(300).batches(1)
    ]
    return _compiled(nncf.quantize(ov.convert_model(str(export(model, folder))), nncf.Dataset(rows)))


def _compiled(made: Any) -> Answer:
    import openvino as ov

    compiled = ov.Core().compile_model(made, "CPU")
    return lambda leaves: list(compiled(list(leaves)).values())


PEERS = {
    "eager": eager, "torch.compile": torch_compile, "ONNX Runtime": ort, "ONNX Runtime, 1 thread": ort_1_thread,
    "OpenVINO": openvino, "ONNX Runtime, static int8": ort_int8, "NNCF int8": nncf_int8,
}  # fmt: skip


# --- the contest ------------------------------------------------------------------------------------------------------


@dataclass
class _Ready:
    answer: Answer
    batches: list[Any]
    tensors: bool


_ready: list[_Ready] = []


def _prepare(name: str, model: Model, calibrate: Samples, rows: Samples, batch: int, folder: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        answer = PEERS[name](model, calibrate, Path(folder), batch)
    tensors = name in ("eager", "torch.compile")
    batches: list[Any] = timed_batches(rows, batch)
    if tensors:
        import torch

        batches = [tuple(torch.from_numpy(x) for x in b) for b in batches]
    _ready.append(_Ready(answer, batches, tensors))
    for b in batches[:5]:
        answer(b)


def _block(seconds: float, core: int) -> np.ndarray:
    settle_on(core)
    return time_block(_ready[0].answer, _ready[0].batches, seconds)  # type: ignore[arg-type]


def _primary(rows: Samples, signature: Signature) -> np.ndarray:
    """The first output for every row, in batches of the size that was prepared for."""
    ready, found = _ready[0], []
    for chunk in rows.batches(len(ready.batches[0][0])):
        leaves: Any = [np.ascontiguousarray(x) for x in chunk.inputs]
        if ready.tensors:
            import torch

            leaves = [torch.from_numpy(x) for x in leaves]
        leaf, _ = flatten(list(ready.answer(leaves)))
        found.append(to_numpy(leaf[0]))
    return np.concatenate(found)


class Peer:
    """One contestant, ready in a process of its own.

    Args:
        tool: one of `PEERS`; without it, the contestant's name.

    Raises:
        RefusalError: the tool failed on this model; its own words.
    """

    def __init__(
        self, name: str, model: Model, calibrate: Samples, rows: Samples, batch: int, tool: str | None = None
    ) -> None:
        self.name, self._child = name, Child(name)
        self._folder = tempfile.TemporaryDirectory()
        given = (tool or name, model, calibrate, rows, batch, self._folder.name)
        try:
            self._child.call(_prepare, *given, timeout=PREPARE_SECONDS)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def block(self, seconds: float, timeout: float, core: int = 0) -> np.ndarray:
        return self._child.call(_block, seconds, core, timeout=timeout)

    def typical(self, block: np.ndarray) -> float:
        return float(np.median(block))

    def outputs(self, rows: Samples, signature: Signature) -> np.ndarray:
        return self._child.call(_primary, rows, signature, timeout=PREPARE_SECONDS)

    def close(self) -> None:
        self._child.close()
        self._folder.cleanup()


@dataclass(frozen=True)
class Standing:
    """How a contestant did: times faster than eager, ours over it, seconds per call, the metric's value, and the drop.

    `drop` is relative to eager's value, on the same samples; 0.01 is 1 %.
    """

    name: str
    over_eager: Interval
    ours_over_it: Interval
    seconds: float
    quality: float
    drop: Interval


def prepare(
    model: Model, calibrate: Samples, rows: Samples, batch: int, rivals: Mapping[str, Any]
) -> Iterator[tuple[str, Peer | str]]:
    """Every peer that works on this model; for the others, why not.

    Args:
        rivals: modules that others made of this one, by name; they run in ONNX Runtime at its defaults.
    """
    assert model.form is Form.TORCH
    contestants = [(name, model, name) for name in PEERS]
    contestants += [(name, replace(model, content=module), "ONNX Runtime") for name, module in rivals.items()]
    for name, content, tool in contestants:
        try:
            yield name, Peer(name, content, calibrate, rows, batch, tool)
        except RefusalError as error:
            yield name, str(error).splitlines()[0]


def contest(peers: Sequence[Peer], ours: Arm, rounds: int, seconds: float = 0.15) -> dict[str, np.ndarray]:
    """Seconds per call by round for every contestant, `ours` among them; all take turns in random order."""
    rng = np.random.default_rng(0)
    arms: dict[str, Any] = {**{p.name: p for p in peers}, "ours": ours}
    table: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in rng.permutation(list(arms)):
            arm = arms[name]
            table[name].append(arm.typical(arm.block(seconds, 60.0, number)))  # all begin a round on the same core
    return {name: np.array(values) for name, values in table.items()}


def standing(name: str, seen: dict[str, np.ndarray], scores: Mapping[str, Floats], metric: Metric) -> Standing:
    """How one contestant did, from everybody's seconds by round and per-sample scores."""
    return Standing(
        name,
        median_interval(seen["eager"] / seen[name]),
        median_interval(seen[name] / seen["ours"]),
        float(np.median(seen[name])),
        float(metric.value(scores[name].mean(axis=0))),
        _drop(scores[name], scores["eager"], metric),
    )


def _drop(scores: Floats, eager: Floats, metric: Metric) -> Interval:
    sign = 1 if metric.higher_is_better else -1

    def share(ours: Floats, theirs: Floats) -> Floats:
        before = metric.value(theirs)
        return sign * (before - metric.value(ours)) / np.maximum(np.abs(before), 1e-12)

    return paired_bootstrap(scores, eager, share)
