"""A workload: the model, its inputs and the data it is judged on.  `adoption.adopt` makes one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.metric import Metric
from accelerando.signature import Array, Signature, flatten

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
    name.  `log` is what each technique said of its own work, such as which layers it left alone; `lessons` is what it
    can be taught again with, if anything.
    """

    form: Form
    content: Any
    signature: Signature
    log: tuple[str, ...] = ()
    lessons: Lessons | None = None

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
class Lessons:
    """What a model that was cut can be taught again with; techniques of the stage HEAL draw on it.

    Args:
        teacher: the original's module, in eval mode, on the CPU; called as the original is.
        train: rows to learn from; their targets may be missing.
        watch: rows by which early stopping judges: the select split, which the search selects on anyway.
        metric: how answers are judged.
        loss: the owner's own, (the model's answer, targets) -> a scalar tensor; None to guess.
        augment: the owner's own, a tuple of flat input tensors (n, ...) -> another; None for the trainer's own.
        folder: where checkpoints lie; it outlives the process, and what was learned there is not learned again.
        say: told how learning goes on.
    """

    teacher: Any
    train: Samples
    watch: Samples
    metric: Metric
    loss: Callable[[Any, Any], Any] | None
    augment: Callable[[Any], Any] | None
    folder: Path
    say: Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """A model and the data it is judged on.

    `calibrate` (and `train`, where the user gave it) may be seen by techniques; `select` by the search;
    `certify` is used once.  `loss` and `augment` are the owner's own for retraining, if any.  `notes` say what was
    found odd and what was done about it.  `digest` is what any evidence is about.
    """

    model: Model
    metric: Metric
    calibrate: Samples
    select: Samples
    certify: Samples
    train: Samples | None
    notes: tuple[str, ...]
    digest: str
    loss: Callable[[Any, Any], Any] | None = None
    augment: Callable[[Any], Any] | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The one batch size that the model takes, or None where any will do."""
        return self.model.signature.fixed_batch

    @property
    def teachable(self) -> Model:
        """The model with what it can be taught with again, where it is a torch module and there is training data."""
        if self.train is None or self.model.form is not Form.TORCH:
            return self.model
        return with_lessons(self.model, self.train, self.select, (self.metric, self.loss, self.augment), Path())

    def __str__(self) -> str:
        return (
            f"{self.model.form.value} model, {len(self.select)} samples to select on and "
            f"{len(self.certify)} to certify, judged by {self.metric.name}"
        )


def with_lessons(
    model: Model,
    train: Samples,
    watch: Samples,
    owner: tuple[Metric, Callable[[Any, Any], Any] | None, Callable[[Any], Any] | None],
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Model:
    """A torch model with its lessons; `owner` is the metric, the loss and the augmentation."""
    return replace(model, lessons=Lessons(model.content, train, watch, *owner, folder, say))


def filled(inputs: Sequence[Array], size: int | None) -> tuple[Array, ...]:
    """Rows made exactly `size` long, by taking them round and round or cutting; as they are where size is None."""
    if size is None:
        return tuple(inputs)
    return tuple(x[np.arange(size) % len(x)] for x in inputs)


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
