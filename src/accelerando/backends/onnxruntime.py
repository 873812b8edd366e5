"""ONNX Runtime on the processor: the one backend that the base install brings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from accelerando.backends._arena import join_arena, shrink_arena
from accelerando.backends._shared import closed, load_once
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Runner
from accelerando.signature import Array, Signature
from accelerando.workload import Form, Model

# A protobuf holds at most 2 GiB; from here on weights lie beside the model.
INLINE_BYTES = 1_500_000_000
# What each level adds: constant folding; fused operators; blocked convolutions and other layouts.
LEVELS = {"basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


@dataclass(frozen=True)
class Onnxruntime(Backend):
    """Run the ONNX file in ONNX Runtime's CPU provider.

    The optimized graph is not stored: it holds layouts of the processor that made it, and making it again when the
    file is loaded takes milliseconds.  Runners are thread-safe.  Where a process is told that they are `shared`, they
    take memory from one arena, and what has the same files and settings is loaded once.

    Args:
        threads: threads within an operator; 0 is ONNX Runtime's own choice, the physical cores.
        batch: rows for which a session with fixed shapes is made, 0 for none.  Shape arithmetic folds away, which
            is worth a fifth for small transformers; other batches run in a second session, made at the first of them.
        optimization: graph rewrites: `basic`, `extended` or `all`.
        arena: keep freed memory for the next call; without it the peak is lower.
        spinning: threads wait for work in a loop, which answers faster and burns the cores that others may want.
    """

    threads: int = 0
    batch: int = 0
    optimization: str = "all"
    arena: bool = True
    spinning: bool = True

    takes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def __post_init__(self) -> None:
        if self.optimization not in LEVELS:
            raise ValueError(f"optimization must be one of {', '.join(LEVELS)}, but is {self.optimization!r}")
        if self.threads < 0 or self.batch < 0:
            raise ValueError(f"threads and batch must be 0 or more, but are {self.threads} and {self.batch}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Onnxruntime]:
        plain = cls()
        yield plain
        counts = machine.thread_counts
        dynamic = isinstance(model.signature.inputs[0].shape[0], str)
        if dynamic:
            yield replace(plain, batch=1)
        for threads in counts:
            yield replace(plain, threads=threads)
        if dynamic and counts[0] != counts[-1]:
            yield replace(plain, threads=1, batch=1)
        yield replace(plain, optimization="extended")
        yield replace(plain, arena=False)
        yield replace(plain, spinning=False)

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        rows = model.signature.inputs[0].shape[0]
        if self.batch and isinstance(rows, int):
            return RefusalError(Reason.NOTHING_TO_DO, f"the model's batch is already fixed, at {rows}")
        return None

    def compile(self, model: Model, folder: Path) -> Artifact:
        """Copy the model as `model.onnx`; with a fixed batch, `batch.json` names the axes that it fixes.

        Raises:
            RefusalError: ONNX Runtime does not take the model, or its batch can't be fixed.
        """
        path = folder / "model.onnx"
        try:
            _copy(Path(model.content), path)
            session = self._session(path, unoptimized=True)
        except RefusalError:
            raise
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime does not take it: {error}") from error
        _ports(session, model.signature)
        if self.batch:
            axes = {node.shape[0] for node in session.get_inputs()}
            if not all(isinstance(axis, str) for axis in axes):
                raise RefusalError(Reason.UNSUPPORTED, f"the batch axis must have a name to be fixed, but is {axes}")
            (folder / "batch.json").write_text(json.dumps(sorted(axes)))
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        return load_once(self, artifact, signature, lambda: self._runner(folder, signature))

    def _runner(self, folder: Path, signature: Signature) -> Runner:
        path = folder / "model.onnx"
        if not self.batch:
            return _Dynamic(self._session(path), signature)
        axes = tuple(json.loads((folder / "batch.json").read_text()))
        return _Fixed(self, path, axes, signature)

    def _session(self, path: Path, axes: Sequence[str] = (), unoptimized: bool = False) -> Any:
        """A session on a file, with these axes fixed to `batch`."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # its errors are raised; what else it would say is for its developers
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = self.arena
        if self.arena and self.settings.get("shared"):
            join_arena(options)
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        level = "ORT_DISABLE_ALL" if unoptimized else LEVELS[self.optimization]
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        for axis in axes:
            options.add_free_dimension_override_by_name(axis, self.batch)
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Dynamic(Runner):
    """One session.  Thread-safe, as sessions are."""

    def __init__(self, session: Any, signature: Signature) -> None:
        self._run = session.run
        self._inputs, self._outputs = _ports(session, signature)

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        return self._run(self._outputs, _feed(leaves, self._inputs))

    def close(self) -> None:
        self._run = closed
        shrink_arena()


class _Fixed(Runner):
    """A session for one size of batch, and one for all others once there are others.  Thread-safe."""

    def __init__(self, backend: Onnxruntime, path: Path, axes: Sequence[str], signature: Signature) -> None:
        self._backend, self._path = backend, path
        session = backend._session(path, axes)
        self._fixed = session.run
        self._inputs, self._outputs = _ports(session, signature)
        self._other: Any = None
        self._lock = Lock()

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        run = self._fixed if len(leaves[0]) == self._backend.batch else self._other or self._dynamic()
        return run(self._outputs, _feed(leaves, self._inputs))

    def _dynamic(self) -> Any:
        with self._lock:
            self._other = self._other or self._backend._session(self._path).run
            return self._other

    def close(self) -> None:
        self._fixed = self._other = closed
        shrink_arena()


_Input = tuple[int, str, Any]  # which leaf, the name to feed it by, its dtype


def _feed(leaves: Sequence[Array], inputs: Sequence[_Input]) -> dict[str, Array]:
    """What `run` takes.  ONNX Runtime itself copies where an array is not contiguous."""
    return {name: leaves[i] if leaves[i].dtype == dtype else leaves[i].astype(dtype) for i, name, dtype in inputs}


def _ports(session: Any, signature: Signature) -> tuple[tuple[_Input, ...], list[str]]:
    """The session's inputs as leaves of the signature, and its outputs in order.

    Raises:
        RefusalError: the model in the file has other inputs or outputs than the signature.
    """
    names = [port.name for port in signature.inputs]
    taken = [node.name for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]
    if not set(taken) <= set(names) or len(outputs) != len(signature.outputs):  # an unused input may be gone
        raise RefusalError(
            Reason.WRONG_FORM,
            f"the file maps {', '.join(taken)} to {len(outputs)} outputs, but the model is called with "
            f"{', '.join(names)} and gives {len(signature.outputs)}",
        )
    inputs = tuple((names.index(name), name, np.dtype(signature.inputs[names.index(name)].dtype)) for name in taken)
    return inputs, outputs


def _copy(source: Path, target: Path) -> None:
    """Copy a model with the weights that lie outside it, into one file where that may be.

    Raises:
        RefusalError: weights may lie outside, and onnx is not there to tell.
    """
    if not any(p.is_file() and p != source for p in source.parent.rglob("*")):
        shutil.copyfile(source, target)  # it is alone, and a model can't reach outside its folder
        return
    try:
        import onnx
    except ImportError as error:
        raise RefusalError(
            Reason.MISSING_PACKAGE,
            f"other files lie beside {source.name}, and onnx is needed to tell whether its weights are in them: "
            "move it to a folder of its own, or pip install onnx",
        ) from error
    if not any(t.external_data for t in _tensors(onnx.load(source, load_external_data=False).graph)):
        shutil.copyfile(source, target)
        return
    proto = onnx.load(source)
    size = sum(len(t.raw_data) for t in _tensors(proto.graph))
    onnx.save(proto, target, save_as_external_data=size > INLINE_BYTES, location="model.onnx.data")


def _tensors(graph: Any) -> Iterable[Any]:
    """Every stored tensor of a graph and of the graphs within its operators."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _tensors(inner)
