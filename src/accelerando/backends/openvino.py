"""OpenVINO on the processor."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np

from accelerando.backends._shared import load_once
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Runner
from accelerando.signature import Array, Signature
from accelerando.workload import Form, Model

HINTS = ("latency", "throughput")
PRECISIONS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Openvino(Backend):
    """Run an ONNX or OpenVINO file in OpenVINO's CPU plugin.

    With more than one stream, a batch is split over them and they run at once.  Runners are thread-safe.  Where a
    process is told that they are `shared`, what has the same files and settings is compiled once.

    Args:
        threads: threads of all streams together; 0 is OpenVINO's own choice, the physical cores.
        batch: rows for which the model is compiled with fixed shapes, 0 for none.  That was worth half again for a
            small transformer; other batches run in a second compilation, made at the first of them.
        streams: batches that run at once; 0 follows the hint.
        hint: `latency` is one stream, `throughput` as many as OpenVINO sees fit.
        precision: of the arithmetic within.  OpenVINO's own choice is bf16 wherever the processor has it, which
            rounds to 8 bits without a word; here that is asked for or does not happen.
    """

    threads: int = 0
    batch: int = 0
    streams: int = 0
    hint: str = "latency"
    precision: str = "f32"

    takes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX, Form.OPENVINO})
    needs: ClassVar[tuple[str, ...]] = ("openvino",)

    def __post_init__(self) -> None:
        if self.hint not in HINTS or self.precision not in PRECISIONS:
            raise ValueError(
                f"hint must be one of {', '.join(HINTS)} and precision one of {', '.join(PRECISIONS)}, "
                f"but they are {self.hint!r} and {self.precision!r}"
            )
        if min(self.threads, self.batch, self.streams) < 0:
            raise ValueError(f"threads, batch and streams must be 0 or more, but are {self.knobs}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Openvino]:
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
        for precision, native in (("bf16", machine.bf16), ("f16", machine.fp16)):
            if native:
                yield replace(plain, precision=precision)
                if dynamic:
                    yield replace(plain, precision=precision, batch=1)
        if machine.cores > 1:
            yield replace(plain, streams=machine.cores)
            yield replace(plain, hint="throughput")

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        rows = model.signature.inputs[0].shape[0]
        if self.batch and isinstance(rows, int):
            return RefusalError(Reason.NOTHING_TO_DO, f"the model's batch is already fixed, at {rows}")
        if (self.streams > 1 or self.hint == "throughput") and isinstance(rows, int):
            return RefusalError(Reason.UNSUPPORTED, f"the batch is fixed at {rows}, so it can't be split over streams")
        if (self.precision == "bf16" and not machine.bf16) or (self.precision == "f16" and not machine.fp16):
            return RefusalError(Reason.NOT_NATIVE, f"{machine.cpu} has no {self.precision} arithmetic")
        return None

    def compile(self, model: Model, folder: Path) -> Artifact:
        """Write `model.xml` and `model.bin`, weights in full precision.

        Raises:
            RefusalError: OpenVINO does not take the model.
        """
        if model.form is Form.OPENVINO:
            source = Path(model.content)
            shutil.copyfile(source, folder / "model.xml")
            shutil.copyfile(source.with_suffix(".bin"), folder / "model.bin")
            return Artifact.gather(folder)
        import openvino

        try:
            # Not convert_model, which reports to its makers over the network where it may.
            graph = openvino.Core().read_model(str(model.content))
            openvino.save_model(graph, str(folder / "model.xml"), compress_to_fp16=False)
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"OpenVINO does not take it: {error}") from error
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        return load_once(self, artifact, signature, lambda: self._runner(folder, signature))

    def _runner(self, folder: Path, signature: Signature) -> Runner:
        streams = self._compiled(folder, 0) if self.hint == "throughput" and not self.streams else None
        parts = int(streams.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")) if streams else max(self.streams, 1)
        part = -(-self.batch // parts)  # rows of the largest part of a batch that is split
        dynamic = streams or (None if part else self._compiled(folder, 0))
        fixed = self._compiled(folder, part) if part else None
        requests = {
            part: _Requests(fixed or dynamic, signature),
            **({0: _Requests(dynamic, signature)} if dynamic else {}),
        }
        return _Split(requests, parts, lambda: _Requests(self._compiled(folder, 0), signature))

    def _compiled(self, folder: Path, rows: int) -> Any:
        """The compiled model, its batch fixed to `rows` where that is not 0."""
        import openvino

        core = openvino.Core()
        graph = core.read_model(folder / "model.xml")
        if rows:
            shapes = {node: openvino.PartialShape([rows, *list(node.partial_shape)[1:]]) for node in graph.inputs}
            graph.reshape(shapes)
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": self.hint.upper(),
        }
        if self.streams:
            config["NUM_STREAMS"] = self.streams
        if self.threads:
            config["INFERENCE_NUM_THREADS"] = self.threads
        return core.compile_model(graph, "CPU", config)


class _Split(Runner):
    """Runs a batch in as many parts as there are streams.

    Args:
        requests: by the rows that they are compiled for; 0 for any number.
        parts: how many parts run at once.
        dynamic: makes those for any number of rows, where they are not there yet.
    """

    def __init__(self, requests: dict[int, _Requests], parts: int, dynamic: Any) -> None:
        self._requests, self._parts, self._dynamic = requests, parts, dynamic
        self._lock = Lock()

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        rows = len(leaves[0])
        if self._parts == 1 or rows == 1:
            pool = self._pool(rows)
            request, held = pool.begin(leaves)
            request.infer(share_outputs=True)
            del held
            return pool.end(request)
        step = -(-rows // self._parts)
        running = []
        for start in range(0, rows, step):
            part = [x[start : start + step] for x in leaves]
            pool = self._pool(len(part[0]))
            request, held = pool.begin(part)
            request.start_async()
            running.append((pool, request, held))
        answers = []
        for pool, request, _ in running:
            request.wait()
            answers.append(pool.end(request))
        return [np.concatenate(pieces) for pieces in zip(*answers, strict=True)]

    def _pool(self, rows: int) -> _Requests:
        found = self._requests.get(rows) or self._requests.get(0)
        if found is None:
            with self._lock:
                found = self._requests.setdefault(0, self._requests.get(0) or self._dynamic())
        return found


class _Requests:
    """Inference requests of one compiled model: each serves one caller at a time, and is used again.

    Raises:
        RefusalError: the model in the file has other inputs or outputs than the signature.
    """

    def __init__(self, compiled: Any, signature: Signature) -> None:
        import openvino

        self._compiled, self._tensor = compiled, openvino.Tensor
        self._idle: list[Any] = []
        names = [port.name for port in signature.inputs]
        leaf_of = [next((names.index(n) for n in node.get_names() if n in names), -1) for node in compiled.inputs]
        if -1 in leaf_of or len(compiled.outputs) != len(signature.outputs):
            raise RefusalError(
                Reason.WRONG_FORM,
                f"the file maps {', '.join(node.get_any_name() for node in compiled.inputs)} to "
                f"{len(compiled.outputs)} outputs, but the model is called with {', '.join(names)} and gives "
                f"{len(signature.outputs)}",
            )
        self._inputs = [
            (port, leaf, np.dtype(node.get_element_type().to_dtype()))
            for port, (leaf, node) in enumerate(zip(leaf_of, compiled.inputs, strict=True))
        ]
        self._outputs = range(len(compiled.outputs))

    def begin(self, leaves: Sequence[Array]) -> tuple[Any, list[Array]]:
        """A request that refers to these inputs, and the arrays that must live until it is done."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        held = []
        for port, leaf, dtype in self._inputs:
            array = leaves[leaf]
            if array.dtype != dtype or not array.flags.carray:  # neither a view nor read-only memory can be shared
                array = np.array(array, dtype=dtype, order="C")
            held.append(array)
            request.set_input_tensor(port, self._tensor(array, shared_memory=True))
        return request, held

    def end(self, request: Any) -> list[Array]:
        """The answers, in memory of their own: the request's is used again."""
        answers = [request.get_output_tensor(i).data.copy() for i in self._outputs]
        self._idle.append(request)
        return answers
