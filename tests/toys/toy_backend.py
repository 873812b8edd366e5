"""A toy backend in one file, as somebody else's package would bring it: ONNX Runtime with a fault on order."""

from __future__ import annotations

import ctypes
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Runner
from accelerando.signature import Array, Signature
from accelerando.workload import Form, Model

FAULTS = ("segfault", "hang", "memory", "nan", "shape", "partial", "raise")


class ToyRunner(Runner):
    def __init__(self, path: Path, signature: Signature, fault: str, slower: float, wrong: float) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [p.name for p in signature.inputs]
        self.fault, self.slower, self.wrong = fault, slower, wrong

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        start = time.perf_counter()
        outputs = list(self.session.run(None, dict(zip(self.names, leaves, strict=True))))
        end = start + (time.perf_counter() - start) * self.slower
        while time.perf_counter() < end:
            pass
        if self.wrong:  # the share of rows whose answer is turned round
            rows = np.abs(leaves[0].reshape(len(leaves[0]), -1).sum(axis=1) * 1e4) % 1 < self.wrong
            outputs[0] = np.where(rows[:, None], -outputs[0], outputs[0])
        match self.fault:
            case "segfault":
                ctypes.string_at(0)
            case "hang":
                time.sleep(3600)
            case "memory":
                hoard = [np.ones(2**24) for _ in range(64)]
                time.sleep(len(hoard))
            case "nan":
                outputs[0] = outputs[0] * np.float32("nan")
            case "shape":
                outputs[0] = outputs[0][:, :1]
            case "raise":
                raise ZeroDivisionError("a toy broke")
        return outputs


@dataclass(frozen=True)
class ToyBackend(Backend):
    """`slower` is how many times slower than it need be; `wrong` the share of answers that are turned round."""

    fault: str = ""
    slower: float = 1.0
    wrong: float = 0.0

    takes: ClassVar[frozenset[Form]] = frozenset({Form.ONNX})
    needs: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Backend]:
        return [cls(), *(cls(fault=f) for f in FAULTS)]

    def compile(self, model: Model, folder: Path) -> Artifact:
        shutil.copyfile(model.content, folder / "model.onnx")
        artifact = Artifact.gather(folder)
        if self.fault == "partial":
            (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:100])
        return artifact

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> ToyRunner:
        return ToyRunner(folder / "model.onnx", signature, self.fault, self.slower, self.wrong)
