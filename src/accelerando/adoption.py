"""Adoption: what a user has becomes a `Workload`, and all of it is checked before any work starts.

The model is copied, never changed; its signature is learned by calling it; the data is split in three: *calibrate*
for techniques, *select* for the search, *certify* for the figures that are printed.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from accelerando import metric as metrics
from accelerando.errors import DataError, MissingExtraError, ModelError
from accelerando.intake import LEAST_ROWS, Batch, check_ports, check_rows, gather
from accelerando.metric import Metric
from accelerando.schooling import schooled
from accelerando.signature import Array, Node, Port, Signature, flatten, name_axes, to_numpy
from accelerando.workload import EVAL_ROWS, Chunk, Form, Model, Samples, Workload, filled, own_module

CALIBRATION_ROWS = 512  # more adds time and no accuracy to post-training quantization
SELECT_SHARE = 0.4  # of what is judged; certify gets the rest, for the verdict stands on it


def adopt(
    model: Any,
    data: Any,
    train: Any = None,
    metric: str | Callable[[Any, Any], Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    augment: Callable[[Any], Any] | None = None,
) -> Workload:
    """Take in a model and data as a user has them.

    Args:
        model: a torch.nn.Module, or the path of an .onnx file.
        data: arrays, tensors, (inputs, targets), a dict of keyword inputs, a DataLoader, a Dataset, or any
            iterable of batches of these.  Axis 0 of every array is the batch.
        train: more of the same, for calibration and retraining; without it a part of `data` is set aside.
        metric: a name, a function (outputs, targets) -> per-sample scores, or None to guess.
        loss: for retraining, (the model's answer, targets) -> a scalar tensor; None to guess.
        augment: for retraining, a tuple of input tensors (n, ...) -> another; None for a safe default.

    Raises:
        ModelError: the model can't be called with the data, or answers with NaN.
        DataError: the data is empty, uneven or holds NaN, or the metric, or what is to be learned, does not fit.
        UsageError: the loss or the augmentation fails on some rows, or gives something else than it must.
        MissingExtraError: the model's own framework is not installed.
    """
    owned, call, parameters, notes = _own(model)
    first, rows = gather(data, owned.required, "data")
    signature = _learn(call, parameters, first, rows, owned)
    check_rows(rows, "data", LEAST_ROWS)
    notes += _probe(call, signature, rows)
    train_rows = None
    if train is not None:
        _, train_rows = gather(train, owned.required, "train")
        check_rows(train_rows, "train", 1)
        check_ports(signature, train_rows, "train")
    like = rows.chunks[0].targets
    chosen, rows, note = _choose_metric(metric, call, signature, rows)
    notes += note
    ready = Model(owned.form, owned.content, signature)
    if train_rows is not None:
        train_rows = schooled(train_rows, ready, chosen, like, loss, augment)
        calibrate = train_rows.take(CALIBRATION_ROWS)
        select, certify = rows.split(SELECT_SHARE, 1 - SELECT_SHARE)
    else:
        aside = min(0.2, CALIBRATION_ROWS / len(rows))
        calibrate, select, certify = rows.split(aside, (1 - aside) * SELECT_SHARE, (1 - aside) * (1 - SELECT_SHARE))
    digest = _digest(ready, chosen, calibrate, select, certify)
    return Workload(ready, chosen, calibrate, select, certify, train_rows, tuple(notes), digest, loss, augment)


@dataclass(frozen=True)
class _Owned:
    form: Form
    content: Any
    fixed_batch: int | None = None
    output_names: tuple[str, ...] | None = None
    required: int = 1  # how many inputs a call must have: tells a batch of inputs from (inputs, targets)


def _own(model: Any) -> tuple[_Owned, Callable[..., Any], tuple[str, ...], list[str]]:
    """The model as ours: form and content, how to call it, its parameters, and what was odd."""
    if isinstance(model, (str, Path)):
        return _own_onnx(Path(model))
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; give a torch.nn.Module or the path of an .onnx file")
    ours, notes = own_module(model), []
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())} - {"cpu"}
    if devices:
        notes.append(f"the model was on {', '.join(sorted(devices))}; a copy on the CPU is used")
    if any(m.training for m in model.modules()):
        notes.append("the model was in training mode; a copy in eval mode is used")

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return ours(*map(_tensor, args), **{k: _tensor(v) for k, v in kwargs.items()})

    def _tensor(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.array(value))
        if isinstance(value, Mapping):
            return {k: _tensor(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(_tensor(v) for v in value)
        return value

    kinds = inspect.Parameter
    parameters = inspect.signature(ours.forward).parameters.values()
    names = tuple(
        p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    )
    places = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    required = sum(p.default is kinds.empty and p.kind in places for p in parameters)
    return _Owned(Form.TORCH, ours, required=required), call, names, notes


def _own_onnx(path: Path) -> tuple[_Owned, Callable[..., Any], tuple[str, ...], list[str]]:
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of an .onnx file")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("an .onnx file needs onnxruntime: pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"{path} does not load in ONNX Runtime: {error}") from error
    ins = session.get_inputs()
    names = tuple(i.name for i in ins)
    leading = {i.shape[0] for i in ins if i.shape}
    fixed = next(iter(leading)) if len(leading) == 1 and isinstance(next(iter(leading)), int) else None

    def call(*args: Any, **kwargs: Any) -> Any:
        feed = {**dict(zip(names, args, strict=False)), **kwargs}
        return tuple(session.run(None, {k: to_numpy(v) for k, v in feed.items()}))

    outputs = tuple(o.name for o in session.get_outputs())
    return _Owned(Form.ONNX, path.resolve(), fixed, outputs, len(names)), call, names, []


def _learn(
    call: Callable[..., Any], parameters: tuple[str, ...], first: Batch, rows: Samples, owned: _Owned
) -> Signature:
    """The signature, by calling the model once for each shape of input, and with fewer rows."""
    names = list(parameters[: len(first.args)])
    names += [f"input_{i}" for i in range(len(names), len(first.args))]
    arguments: dict[str, Node] = {}
    leaves: list[Any] = []
    ports: list[str] = []
    for name, value in [*zip(names, first.args, strict=True), *first.kwargs.items()]:
        inside, node = flatten(value)
        arguments[name] = _shift(node, len(leaves))
        leaves += inside
        ports += [name] if len(inside) == 1 else [f"{name}_{i}" for i in range(len(inside))]
    draft = Signature(
        (), (), (*parameters, *(n for n in arguments if n not in parameters)), len(first.args), arguments, {}
    )
    shapes_in, shapes_out, result, dtypes = [], [], None, None
    for chunk in rows.chunks[:16]:
        for count in {owned.fixed_batch} if owned.fixed_batch else {min(2, len(chunk)), 1}:
            inputs = filled([x[:count] for x in chunk.inputs], owned.fixed_batch)
            answer, node = _answer(call, draft, inputs)
            outputs = [to_numpy(x) for x in answer]
            for out in outputs:
                if out.ndim == 0 or len(out) != count:
                    raise ModelError(
                        f"for {count} samples the model answers with shape {out.shape}; axis 0 of every output must be "
                        "the batch: wrap the model so that it gives per-sample outputs"
                    )
            if result is not None and node != result:
                raise ModelError(f"the structure of the model's answer changes with its input: {result}, then {node}")
            result, dtypes = node, [str(o.dtype) for o in outputs]
            shapes_in.append([x.shape for x in inputs])
            shapes_out.append([o.shape for o in outputs])
    assert result is not None
    assert dtypes is not None
    axes = name_axes([[*i, *o] for i, o in zip(shapes_in, shapes_out, strict=True)])
    if owned.fixed_batch:
        axes = [(owned.fixed_batch, *shape[1:]) for shape in axes]
    n = len(ports)
    inputs_ = tuple(Port(p, str(x.dtype), s) for p, x, s in zip(ports, rows.chunks[0].inputs, axes[:n], strict=True))
    out_names = owned.output_names or _output_names(result, len(dtypes))
    outputs_ = tuple(Port(p, d, s) for p, d, s in zip(out_names, dtypes, axes[n:], strict=True))
    taken = {p.name for p in inputs_}
    outputs_ = tuple(p if p.name not in taken else replace(p, name=f"{p.name}_out") for p in outputs_)
    return replace(draft, inputs=inputs_, outputs=outputs_, result=result)


def _answer(call: Callable[..., Any], signature: Signature, inputs: Sequence[Array]) -> tuple[list[Any], Node]:
    """Call the model; its own error, with the shapes that were given, becomes ours."""
    args, kwargs = signature.call(list(inputs))
    try:
        answer = call(*args, **kwargs)
    except Exception as error:
        given = ", ".join(f"{x.dtype}{x.shape}" for x in inputs)
        raise ModelError(f"the model rejects the inputs {given}: {type(error).__name__}: {error}") from error
    if isinstance(answer, tuple) and len(answer) == 1 and signature.positional >= 0 and hasattr(answer[0], "shape"):
        pass  # a tuple of one stays a tuple of one: same structure out
    return flatten(answer)


def _shift(node: Node, by: int) -> Node:
    """A node with its leaves counted from `by`."""
    match node:
        case {"leaf": int(index)}:
            return {"leaf": index + by}
        case {"tuple": items}:
            return {"tuple": [_shift(i, by) for i in items]}
        case {"list": items}:
            return {"list": [_shift(i, by) for i in items]}
        case {"dict": fields}:
            return {"dict": {k: _shift(v, by) for k, v in fields.items()}}
        case {"object": kind, "fields": fields}:
            return {"object": kind, "fields": {k: _shift(v, by) for k, v in fields.items()}}
    return node


def _output_names(result: Node, count: int) -> list[str]:
    """Names for the outputs: field names where the answer has them."""
    fields = result.get("dict") or result.get("fields") or {}
    named = {node["leaf"]: name for name, node in fields.items() if "leaf" in node}
    return [named.get(i, "output" if count == 1 else f"output_{i}") for i in range(count)]


def _probe(call: Callable[..., Any], signature: Signature, rows: Samples) -> list[str]:
    """Is the original finite, and does it answer the same twice?"""
    step = signature.fixed_batch or EVAL_ROWS
    inputs = filled(next(rows.batches(step)).inputs, signature.fixed_batch)
    once, twice = ([to_numpy(x) for x in _answer(call, signature, inputs)[0]] for _ in range(2))
    for port, out in zip(signature.outputs, once, strict=True):
        if out.dtype.kind == "f" and not np.isfinite(out).all():
            raise ModelError(
                f"the original answers with NaN or infinity in {port}; it must be finite to be compared with"
            )
    changed = [
        f"{port.name} by up to {np.max(np.abs(a.astype(np.float64) - b)):.2g}"
        for port, a, b in zip(signature.outputs, once, twice, strict=True)
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5)
    ]
    if changed:
        return [
            f"the model answers differently from call to call ({', '.join(changed)}); "
            "it is measured as it is, and its quality has that noise in it"
        ]
    return []


def _choose_metric(
    metric: str | Callable[[Any, Any], Any] | None,
    call: Callable[..., Any],
    signature: Signature,
    rows: Samples,
) -> tuple[Metric, Samples, list[str]]:
    """The metric, the rows with the targets that it needs, and what was guessed."""
    step = signature.fixed_batch or EVAL_ROWS
    batch = next(rows.batches(step))
    inputs = filled(batch.inputs, signature.fixed_batch)
    leaves = [to_numpy(x)[: len(batch)] for x in _answer(call, signature, inputs)[0]]
    answer = signature.answer(leaves)
    notes = []
    if isinstance(metric, str):
        chosen = metrics.named(metric)
    elif metric is not None:
        chosen = metrics.of_function(metric)
    else:
        chosen = metrics.guess(answer, batch.targets)
        notes.append(f"no metric was given; judged by {chosen.name}")
    if chosen.of_original:
        if rows.targets is not None:
            notes.append(f"{chosen.name} compares with the original's own outputs; the targets given are not used")
        rows = Samples(tuple(_answered(call, signature, chunk, step) for chunk in rows.chunks))
        batch = next(rows.batches(step))
    elif batch.targets is None:
        raise DataError(f"the metric {chosen.name!r} needs targets: give data=(inputs, targets), or metric='agreement'")
    assert batch.targets is not None
    chosen.scores(answer, batch.targets)
    return chosen, rows, notes


def _answered(call: Callable[..., Any], signature: Signature, chunk: Chunk, step: int) -> Chunk:
    """A chunk whose targets are the original's own outputs."""
    parts = []
    for start in range(0, len(chunk), step):
        rows = [x[start : start + step] for x in chunk.inputs]
        leaves = [to_numpy(x) for x in _answer(call, signature, filled(rows, signature.fixed_batch))[0]]
        parts.append(metrics.primary(signature.answer(leaves))[: len(rows[0])])
    return Chunk(chunk.inputs, np.concatenate(parts))


def _digest(model: Model, metric: Metric, *splits: Samples) -> str:
    """A hash of all that evidence depends on: weights, structure, data, metric."""
    digest = hashlib.sha256(f"{model.form.value}{model.signature}{metric.name}{metric.higher_is_better}".encode())
    digest.update(metric.source.encode())
    if model.form is Form.TORCH:
        digest.update(repr(model.content).encode())
        kinds: set[object] = {type(m) for m in model.content.modules()}
        for kind in sorted(kinds, key=str):
            digest.update(_source(kind).encode())  # a forward() that was edited is another model
        for name, tensor in model.content.state_dict().items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(to_numpy(tensor)).tobytes())
    else:
        path = Path(model.content)
        for file in (path, *_beside(path)):
            digest.update(file.read_bytes())
    for split in splits:
        split.digest(digest)
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _source(kind: object) -> str:
    """The source text of a class, for which Python parses the whole file each time that it is asked."""
    return metrics.source_of(kind)


def _beside(path: Path) -> list[Path]:
    """The files beside an .onnx file that hold its weights."""
    import onnx
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = onnx.load(str(path), load_external_data=False)
    named = {
        e.value
        for t in _get_all_tensors(model)
        if uses_external_data(t)
        for e in t.external_data
        if e.key == "location"
    }
    return [path.parent / name for name in sorted(named)]
