"""A workload: the model, its inputs and the data it is judged on.

`Workload.adopt` takes what a user has (a module or an ONNX file, and arrays, loaders or batches), checks all of
it before any work starts, learns the signature by calling the model, and splits the data in three: *calibrate*
for techniques, *select* for the search, *certify* for the figures that are printed.  It never changes the
user's model: it works on a copy in eval mode.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from accelerando import metric as metrics
from accelerando.errors import DataError, MissingExtraError, ModelError
from accelerando.metric import Metric
from accelerando.signature import Array, Node, Port, Signature, flatten, name_axes, to_numpy

LABELS = ("labels", "label", "targets", "target", "y")  # keys of a dict batch that are never inputs
CALIBRATION_ROWS = 512  # more adds time and no accuracy to post-training quantization
LEAST_ROWS = 8
SELECT_SHARE = 0.4  # of what is judged; certify gets the rest, for the verdict stands on it
EVAL_ROWS = 64


class Form(Enum):
    """What a model is made of; `Model.content` holds it."""

    TORCH = "torch"  # a torch.nn.Module in eval mode
    EXPORTED = "exported"  # a torch.export.ExportedProgram of the flat model, dynamic batch
    ONNX = "onnx"  # the path of an .onnx file; weights may lie beside it
    OPENVINO = "openvino"  # the path of an OpenVINO .xml file, its .bin beside it


@dataclass(frozen=True)
class Model:
    """A model in one of its forms.

    Every form but TORCH is flat: its inputs and outputs are the signature's ports, in order and (ONNX, OPENVINO) by
    name.  `log` is what each technique said of its own work, such as which layers it left alone.
    """

    form: Form
    content: Any
    signature: Signature
    log: tuple[str, ...] = ()

    def changed(self, form: Form, content: Any, *log: str) -> Model:
        """The model after a technique, with what the technique has to say."""
        return replace(self, form=form, content=content, log=(*self.log, *log))


@dataclass(frozen=True)
class Chunk:
    """Rows that share a shape: flat inputs, each (n, ...), in the signature's order, and targets (n, ...) or none."""

    inputs: tuple[Array, ...]
    targets: Array | None

    def __len__(self) -> int:
        return len(self.inputs[0])

    def rows(self, index: Any) -> Chunk:
        return Chunk(tuple(x[index] for x in self.inputs), None if self.targets is None else self.targets[index])


@dataclass(frozen=True)
class Samples:
    """Rows of data.  Chunks differ in the lengths of their dynamic axes, such as a sequence's."""

    chunks: tuple[Chunk, ...]

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def batches(self, size: int) -> Iterator[Chunk]:
        """Every row once, in batches of at most `size` rows of one shape."""
        for chunk in self.chunks:
            for start in range(0, len(chunk), size):
                yield chunk.rows(slice(start, start + size))

    def pick(self, rows: Array) -> Samples:
        """These rows (numbers over all chunks), in the order of the data."""
        rows, chunks, start = np.sort(rows), [], 0
        for chunk in self.chunks:
            inside = rows[(rows >= start) & (rows < start + len(chunk))] - start
            if len(inside):
                chunks.append(chunk.rows(inside))
            start += len(chunk)
        return Samples(tuple(chunks))

    def take(self, count: int, seed: int = 0) -> Samples:
        """At most `count` rows drawn without replacement; the same rows for the same seed."""
        if count >= len(self):
            return self
        return self.pick(np.random.default_rng(seed).permutation(len(self))[:count])

    def split(self, *shares: float, seed: int = 0) -> tuple[Samples, ...]:
        """Disjoint random parts; each gets its share of the rows, and the last whatever is left."""
        order = np.random.default_rng(seed).permutation(len(self))
        edges = [round(len(self) * s) for s in np.cumsum(shares)[:-1]]
        return tuple(self.pick(part) for part in np.split(order, edges))

    @cached_property
    def targets(self) -> Array | None:
        """All targets, (n, ...), or none."""
        found = [c.targets for c in self.chunks if c.targets is not None]
        return np.concatenate(found) if len(found) == len(self.chunks) else None

    def digest(self, into: Any) -> None:
        """Feed every byte to a hash."""
        for chunk in self.chunks:
            for array in (*chunk.inputs, *(() if chunk.targets is None else (chunk.targets,))):
                into.update(f"{array.dtype}{array.shape}".encode())
                into.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")


@dataclass(frozen=True)
class Workload:
    """A model and the data it is judged on.

    `calibrate` (and `train`, where the user gave it) may be seen by techniques; `select` by the search;
    `certify` is used once.  `notes` say what was found odd and what was done about it.  `digest` is what any
    evidence is about.
    """

    model: Model
    metric: Metric
    calibrate: Samples
    select: Samples
    certify: Samples
    train: Samples | None
    notes: tuple[str, ...]
    digest: str

    @classmethod
    def adopt(
        cls,
        model: Any,
        data: Any,
        *,
        train: Any = None,
        metric: str | Metric | Callable[[Any, Any], Any] | None = None,
    ) -> Workload:
        """Take in a model and data as a user has them.

        Args:
            model: a torch.nn.Module, or the path of an .onnx file.
            data: arrays, tensors, (inputs, targets), a dict of keyword inputs, a DataLoader, a Dataset, or any
                iterable of batches of these.  Axis 0 of every array is the batch.
            train: more of the same, for calibration and retraining; without it a part of `data` is set aside.
            metric: a name, a function (outputs, targets) -> per-sample scores, or None to guess.

        Raises:
            ModelError: the model can't be called with the data, or answers with NaN.
            DataError: the data is empty, uneven or holds NaN, or the metric does not fit.
            MissingExtraError: the model's own framework is not installed.
        """
        owned, call, parameters, notes = _own(model)
        first, rows = _gather(data, parameters, "data")
        signature = _learn(call, parameters, first, rows, owned)
        _check(rows, "data", LEAST_ROWS)
        notes += _probe(call, signature, rows)
        train_rows = None
        if train is not None:
            _, train_rows = _gather(train, parameters, "train")
            _check(train_rows, "train", 1)
            _same_ports(signature, train_rows, "train")
        chosen, rows, note = _choose_metric(metric, call, signature, rows)
        notes += note
        if train_rows is not None:
            calibrate = train_rows.take(CALIBRATION_ROWS)
            select, certify = rows.split(SELECT_SHARE, 1 - SELECT_SHARE)
        else:
            aside = min(0.2, CALIBRATION_ROWS / len(rows))
            calibrate, select, certify = rows.split(
                aside, (1 - aside) * SELECT_SHARE, (1 - aside) * (1 - SELECT_SHARE)
            )
        ready = Model(owned.form, owned.content, signature)
        digest = _digest(ready, chosen, calibrate, select, certify)
        return cls(ready, chosen, calibrate, select, certify, train_rows, tuple(notes), digest)

    @property
    def fixed_batch(self) -> int | None:
        """The one batch size that the model takes, or None where any will do."""
        return self.model.signature.fixed_batch

    def __str__(self) -> str:
        return (
            f"{self.model.form.value} model, {len(self.select)} samples to select on and "
            f"{len(self.certify)} to certify, judged by {self.metric.name}"
        )


def flat_module(model: Model) -> Any:
    """A torch module that takes a TORCH model's flat inputs and gives its flat outputs as a tuple, for exporters."""
    import torch

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.content

        def forward(self, *leaves: Any) -> tuple[Any, ...]:
            args, kwargs = model.signature.call(leaves)
            return tuple(flatten(self.inner(*args, **kwargs))[0])

    return Flat().eval()


def own_module(model: Any) -> Any:
    """A copy of a user's torch module, on the CPU, in eval mode and without gradients."""
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def plain_call(model: Model) -> Callable[[Sequence[Array]], Any]:
    """The original's own call, flat arrays in, its answer out, in this process.  For adoption and for tests."""
    if model.form is Form.ONNX:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(model.content), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda leaves: tuple(session.run(None, dict(zip(names, leaves, strict=True))))
    if model.form is not Form.TORCH:
        raise ValueError(f"an original is a torch module or an ONNX file, not {model.form}")
    import torch

    def call(leaves: Sequence[Array]) -> Any:
        args, kwargs = model.signature.call([torch.from_numpy(np.array(x)) for x in leaves])
        with torch.no_grad():
            return model.content(*args, **kwargs)

    return call


# --- what the user gave, as chunks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any

    @classmethod
    def read(cls, value: Any, required: int, where: str) -> _Batch:
        """One batch as users write it."""
        if isinstance(value, Mapping):
            kwargs = {str(k): v for k, v in value.items() if k not in LABELS}
            return cls((), kwargs, next((value[k] for k in LABELS if k in value), None))
        if isinstance(value, (tuple, list)) and len(value) >= 2 and len(value) != max(required, 2) - (required < 2):
            *inputs, targets = value
            if len(inputs) == 1 and isinstance(inputs[0], (tuple, list, Mapping)):
                inside = cls.read(inputs[0], len(inputs[0]), where)
                return replace(inside, targets=targets if inside.targets is None else inside.targets)
            return cls(tuple(inputs), {}, targets)
        if isinstance(value, (tuple, list)):
            return cls(tuple(value), {}, None)
        if hasattr(value, "shape"):
            return cls((value,), {}, None)
        raise DataError(
            f"{where} holds a {type(value).__name__} where a batch must be: an array, (inputs, targets), or a dict"
        )


def _gather(data: Any, parameters: tuple[str, ...], where: str) -> tuple[_Batch, Samples]:
    """The first batch as it was given, and all rows as chunks of one shape each."""
    first: _Batch | None = None
    groups: dict[Any, list[Chunk]] = {}
    for batch in _each(data, len(parameters), where):
        first = first or batch
        leaves, _ = flatten([*batch.args, batch.kwargs])
        arrays = tuple(to_numpy(x) for x in leaves)
        targets = None if batch.targets is None else to_numpy(batch.targets)
        if not arrays:
            raise DataError(f"{where} holds a batch without any input array")
        if any(a.ndim == 0 for a in arrays):
            raise DataError(f"{where} holds an input without axes; axis 0 of every input must be the batch")
        lengths = {len(a) for a in arrays} | ({len(targets)} if targets is not None and targets.ndim else set())
        if len(lengths) > 1 or (targets is not None and targets.ndim == 0):
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise DataError(
                f"{where}: inputs {shapes} and targets {None if targets is None else targets.shape} differ in length; "
                "axis 0 of every input and of the targets must be the same samples"
            )
        if len(arrays[0]):
            key = tuple((a.dtype.str, a.shape[1:]) for a in arrays), targets is None
            groups.setdefault(key, []).append(Chunk(arrays, targets))
    if first is None or not groups:
        raise DataError(f"{where} is empty; at least {LEAST_ROWS} samples are needed")
    if len({key[1] for key in groups}) > 1:
        raise DataError(f"{where}: some batches have targets and some have none")
    return first, Samples(tuple(_join(chunks) for chunks in groups.values()))


def _each(data: Any, parameters: int, where: str) -> Iterator[_Batch]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.utils.data.Dataset):
        data = torch.utils.data.DataLoader(data, batch_size=EVAL_ROWS)
    if hasattr(data, "shape") or isinstance(data, Mapping):
        yield _Batch.read(data, parameters, where)
    elif isinstance(data, tuple) and len(data) == 2:
        inputs, targets = data
        yield replace(_Batch.read(inputs, 0 if hasattr(inputs, "shape") else len(inputs), where), targets=targets)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        for batch in data:
            yield _Batch.read(batch, parameters, where)
    else:
        raise DataError(
            f"{where} is a {type(data).__name__}; give arrays, (inputs, targets), a dict of inputs, "
            "a DataLoader or an iterable of batches"
        )


def _join(chunks: list[Chunk]) -> Chunk:
    inputs = tuple(np.concatenate(parts) for parts in zip(*(c.inputs for c in chunks), strict=True))
    targets = (
        None if chunks[0].targets is None else np.concatenate([c.targets for c in chunks if c.targets is not None])
    )
    return Chunk(inputs, targets)


def _check(rows: Samples, where: str, least: int) -> None:
    if len(rows) < least:
        raise DataError(f"{where} holds {len(rows)} samples; at least {least} are needed to split and to judge")
    for chunk in rows.chunks:
        for kind, array in [("inputs", x) for x in chunk.inputs] + [("targets", chunk.targets)]:
            if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int((~np.isfinite(array.reshape(len(array), -1))).any(axis=1).sum())
                raise DataError(
                    f"{where}: the {kind} hold NaN or infinity in {bad} samples; clean or drop them first"
                )
            if array is not None and array.dtype.kind not in "fiub":
                raise DataError(f"{where}: the {kind} are of type {array.dtype}; numbers or booleans are needed")


def _same_ports(signature: Signature, rows: Samples, where: str) -> None:
    for chunk in rows.chunks:
        for port, array in zip(signature.inputs, chunk.inputs, strict=False):
            if not port.fits(array):
                raise DataError(f"{where}: an input is {array.dtype}{array.shape}, but data gave {port}")


# --- the model and its signature --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Owned:
    form: Form
    content: Any
    fixed_batch: int | None = None
    output_names: tuple[str, ...] | None = None


def _own(model: Any) -> tuple[_Owned, Callable[..., Any], tuple[str, ...], list[str]]:
    """The model as ours: form and content, how to call it, its parameters, and what was odd."""
    if isinstance(model, (str, Path)):
        return _own_onnx(Path(model))
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"the model is a {type(model).__name__}; give a torch.nn.Module or the path of an .onnx file"
        )
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
        p.name
        for p in parameters
        if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    )
    return _Owned(Form.TORCH, ours), call, names, notes


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
    return _Owned(Form.ONNX, path.resolve(), fixed, outputs), call, names, []


def _learn(
    call: Callable[..., Any], parameters: tuple[str, ...], first: _Batch, rows: Samples, owned: _Owned
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
            inputs = [x[:count] for x in chunk.inputs]
            answer, node = _answer(call, draft, inputs)
            outputs = [to_numpy(x) for x in answer]
            for out in outputs:
                if out.ndim == 0 or len(out) != count:
                    raise ModelError(
                        f"for {count} samples the model answers with shape {out.shape}; axis 0 of every output must be "
                        "the batch: wrap the model so that it gives per-sample outputs"
                    )
            if result is not None and node != result:
                raise ModelError(
                    f"the structure of the model's answer changes with its input: {result}, then {node}"
                )
            result, dtypes = node, [str(o.dtype) for o in outputs]
            shapes_in.append([x.shape for x in inputs])
            shapes_out.append([o.shape for o in outputs])
    assert result is not None
    assert dtypes is not None
    axes = name_axes([[*i, *o] for i, o in zip(shapes_in, shapes_out, strict=True)])
    if owned.fixed_batch:
        axes = [(owned.fixed_batch, *shape[1:]) for shape in axes]
    n = len(ports)
    inputs_ = tuple(
        Port(p, str(x.dtype), s) for p, x, s in zip(ports, rows.chunks[0].inputs, axes[:n], strict=True)
    )
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
    size = signature.inputs[0].shape[0]
    batch = next(rows.batches(size if isinstance(size, int) else EVAL_ROWS))
    once, twice = ([to_numpy(x) for x in _answer(call, signature, batch.inputs)[0]] for _ in range(2))
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
    metric: str | Metric | Callable[[Any, Any], Any] | None,
    call: Callable[..., Any],
    signature: Signature,
    rows: Samples,
) -> tuple[Metric, Samples, list[str]]:
    """The metric, the rows with the targets that it needs, and what was guessed."""
    size = signature.inputs[0].shape[0]
    step = size if isinstance(size, int) else EVAL_ROWS
    batch = next(rows.batches(step))
    answer = signature.answer([to_numpy(x) for x in _answer(call, signature, batch.inputs)[0]])
    notes = []
    if isinstance(metric, Metric):
        chosen = metric
    elif isinstance(metric, str):
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
        raise DataError(
            f"the metric {chosen.name!r} needs targets: give data=(inputs, targets), or metric='agreement'"
        )
    assert batch.targets is not None
    chosen.scores(answer, batch.targets)
    return chosen, rows, notes


def _answered(call: Callable[..., Any], signature: Signature, chunk: Chunk, step: int) -> Chunk:
    """A chunk whose targets are the original's own outputs."""
    parts = []
    for start in range(
        0, len(chunk) - len(chunk) % step if isinstance(signature.inputs[0].shape[0], int) else len(chunk), step
    ):
        inputs = [x[start : start + step] for x in chunk.inputs]
        parts.append(metrics.primary(signature.answer([to_numpy(x) for x in _answer(call, signature, inputs)[0]])))
    targets = np.concatenate(parts)
    return Chunk(tuple(x[: len(targets)] for x in chunk.inputs), targets)


def _digest(model: Model, metric: Metric, *splits: Samples) -> str:
    """A hash of all that evidence depends on: weights, structure, data, metric."""
    digest = hashlib.sha256(f"{model.form.value}{model.signature}{metric.name}".encode())
    if model.form is Form.TORCH:
        digest.update(repr(model.content).encode())
        for name, tensor in model.content.state_dict().items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(to_numpy(tensor)).tobytes())
    else:
        digest.update(Path(model.content).read_bytes())
    for split in splits:
        split.digest(digest)
    return digest.hexdigest()[:16]
