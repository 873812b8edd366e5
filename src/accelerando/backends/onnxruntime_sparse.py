"""ONNX Runtime with products that skip the zeros of a weight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelerando.backends._arena import join_arena, shrink_arena
from accelerando.backends._shared import closed, load_once
from accelerando.backends._sparse_products import Compressed, Product, make_sparse, products
from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Runner
from accelerando.signature import Array, Signature
from accelerando.workload import Form, Model

# From where a sparse product beats a dense one at a single row.  Measured with AVX-512, in microseconds, dense and
# sparse: 2048 x 2048 with 80 % zeros 485 and 371, 90 % 313 and 189, 95 % 281 and 99, 99 % 709 and 26; 512 x 512 with
# 80 % 27 and 44, 90 % 27 and 27, 95 % 27 and 18.  With 16 rows a sparse one breaks even at 95 %.
LEAST_ZEROS, LEAST_NUMBERS = 0.9, 1 << 18
INLINE_BYTES = 1_500_000_000  # a protobuf holds at most 2 GiB


@dataclass(frozen=True)
class OnnxruntimeSparse(Backend):
    """Run the ONNX file in ONNX Runtime's CPU provider, large products with mostly zeros by its sparse kernel.

    Everything else runs as it does in `onnxruntime`.  The kernel uses one thread.  It is for a row at a time: its time
    grows with the rows, while a dense product's hardly does at first.  Runners are thread-safe.

    Args:
        threads: threads within the other operators; 0 is ONNX Runtime's own choice, the physical cores.
        spinning: those threads wait for work in a loop.
    """

    threads: int = 0
    spinning: bool = True

    takes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    offers: ClassVar[frozenset[str]] = frozenset({"sparse products"})
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads must be 0 or more, but is {self.threads}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[OnnxruntimeSparse]:
        plain = cls()
        yield plain
        yield replace(plain, threads=1)
        yield replace(plain, spinning=False)

    def compile(self, model: Model, folder: Path) -> Artifact:
        """Write `model.onnx`, the compressed matrices that are inputs of it, and `matrices.json` with their shapes.

        Raises:
            RefusalError: no large product has enough zeros, or ONNX Runtime does not take the model.
        """
        try:
            import onnx
        except ImportError as error:
            raise RefusalError(
                Reason.MISSING_PACKAGE, "onnx is needed to rewrite the graph: pip install onnx"
            ) from error
        proto = onnx.load(model.content)
        large = [p for p in products(proto.graph) if p.matrix.size >= LEAST_NUMBERS]
        chosen = [p for p in large if p.zeros >= LEAST_ZEROS]
        if not chosen:
            raise RefusalError(Reason.NOTHING_TO_DO, _too_dense(large))
        try:
            matrices = make_sparse(proto, chosen)
            size = sum(len(w.raw_data) for w in proto.graph.initializer)
            onnx.save(
                proto, folder / "model.onnx", save_as_external_data=size > INLINE_BYTES, location="model.onnx.data"
            )
            self._session(folder)
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"ONNX Runtime does not take it: {error}") from error
        for name, matrix in matrices.items():
            matrix.save(folder, name)
        (folder / "matrices.json").write_text(json.dumps({name: m.shape for name, m in matrices.items()}))
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        return load_once(self, artifact, signature, lambda: self._runner(folder, signature))

    def _runner(self, folder: Path, signature: Signature) -> Runner:
        shapes = json.loads((folder / "matrices.json").read_text())
        try:
            matrices = {
                name: Compressed.open(folder, name, (rows, columns)) for name, (rows, columns) in shapes.items()
            }
        except ValueError as error:
            raise RefusalError(Reason.DAMAGED, str(error)) from error
        return _Sparse(self._session(folder), matrices, signature)

    def _session(self, folder: Path) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # its errors are raised; what else it would say is for its developers
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if self.spinning else "0")
        if self.settings.get("shared"):
            join_arena(options)
        return ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


class _Sparse(Runner):
    """A session whose sparse matrices are fed with every call, without a copy.  Thread-safe, as sessions are.

    Raises:
        RefusalError: the model in the file has other inputs or outputs than the signature.
    """

    def __init__(self, session: Any, matrices: dict[str, Compressed], signature: Signature) -> None:
        taken = [node.name for node in session.get_inputs() if node.name not in matrices]
        names = [port.name for port in signature.inputs]
        self._outputs = [node.name for node in session.get_outputs()]
        if not set(taken) <= set(names) or len(self._outputs) != len(signature.outputs):  # an unused input may be gone
            raise RefusalError(
                Reason.WRONG_FORM,
                f"the file maps {', '.join(taken)} to {len(self._outputs)} outputs, but the model is called with "
                f"{', '.join(names)} and gives {len(signature.outputs)}",
            )
        self._inputs = [(names.index(n), n, np.dtype(signature.inputs[names.index(n)].dtype)) for n in taken]
        self._run = session.run
        self._held: list[tuple[Array, ...]] = []
        self._matrices = {name: self._value(matrix) for name, matrix in matrices.items()}

    def _value(self, matrix: Compressed) -> Any:
        """A matrix as the runtime takes it; it refers to our arrays, which are held as long."""
        from onnxruntime import OrtDevice, OrtValue, SparseTensor

        parts = matrix.values, matrix.columns.astype(np.int64), matrix.starts
        self._held.append(parts)
        tensor = SparseTensor.sparse_csr_from_numpy([*matrix.shape], *parts, OrtDevice.make("cpu", 0))
        return OrtValue.ort_value_from_sparse_tensor(tensor)

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        feed: dict[str, Any] = {i: leaves[at].astype(dtype, copy=False) for at, i, dtype in self._inputs}
        return self._run(self._outputs, feed | self._matrices)

    def close(self) -> None:
        self._run = closed
        shrink_arena()


def _too_dense(large: list[Product]) -> str:
    if not large:
        return (
            f"no product with a constant matrix has {LEAST_NUMBERS:,} numbers or more, as 512 x 512 has; "
            "smaller ones don't gain from zeros"
        )
    best = max(large, key=lambda p: p.zeros)
    return (
        f"of {len(large)} large products the sparsest is {best}; at least {LEAST_ZEROS:.0%} must be zeros to gain "
        "(2048 x 2048 at one row, dense and sparse, on a 2-core AVX-512 machine: 485 and 371 us at 80 %, 281 and 99 us "
        "at 95 %)"
    )
