"""The teacher's answers: asked batch by batch, remembered, and kept on disk for the next lesson."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.disk import write_file
from accelerando.errors import BundleError
from accelerando.signature import Array, Signature, flatten, to_numpy
from accelerando.train.rows import Batch
from accelerando.workload import Samples

MOST_BYTES = 256 << 20  # remembered; what does not fit is asked again
FINGERPRINT_ROWS = 256  # of each chunk


class Teacher:
    """The original, as it is asked about rows of the training data.

    Args:
        module: in eval mode; never changed.
        samples: the rows it will be asked about.
        folder: where its answers are kept, under a name that tells its weights and the rows.
    """

    def __init__(self, module: Any, signature: Signature, samples: Samples, folder: Path) -> None:
        self._module, self._signature, self._samples = module, signature, samples
        self._images = any(type(m).__name__ == "Conv2d" for m in module.modules())
        self.bf16 = False  # whether lessons may be told in it: where its products are native it takes half the time
        self.floats = [i for i, port in enumerate(signature.outputs) if port.dtype.startswith("float")]
        self.key = _key(module, samples)
        self._path = folder / f"{self.key}.safetensors"
        self._answers: dict[str, Array] = {}  # "chunk.leaf" -> (rows, ...); "chunk.known" -> (rows,)
        self._room, self._news = MOST_BYTES, False
        self._recall()

    def answers(self, batch: Batch) -> list[Any]:
        """Its float outputs for a batch, as tensors, in the signature's order."""
        import torch

        known = self._answers.get(f"{batch.chunk}.known")
        if known is not None and known[batch.rows].all():
            names = [f"{batch.chunk}.{leaf}" for leaf in self.floats]
            return [torch.from_numpy(self._answers[n][batch.rows].astype(np.float32)) for n in names]
        leaves = self._tell(batch.inputs)
        self._remember(batch, leaves)
        return leaves

    def ask(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Its float outputs for any flat inputs."""
        import torch

        with torch.no_grad():
            args, kwargs = self._signature.call(inputs)
            leaves, _ = flatten(self._module(*args, **kwargs))
        return [leaves[i].detach() for i in self.floats]

    def _tell(self, inputs: tuple[Any, ...]) -> list[Any]:
        """Its float outputs as lessons need them: to the digits that teach, and fast."""
        import torch

        if self._images:  # convolutions take the layout of what they are given
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            leaves = self.ask(inputs)
        return [leaf.float() for leaf in leaves]

    def keep(self) -> None:
        """Write what it answered to disk; where there is no room, the next lesson asks again."""
        from safetensors.numpy import save

        if self._news:
            with contextlib.suppress(BundleError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._path, save(self._answers))
            self._news = False

    def _remember(self, batch: Batch, leaves: list[Any]) -> None:
        if f"{batch.chunk}.known" not in self._answers and not self._make_room(batch.chunk, leaves):
            return
        for leaf, tensor in zip(self.floats, leaves, strict=True):
            kept = self._answers[f"{batch.chunk}.{leaf}"]
            limit = np.finfo(kept.dtype).max
            kept[batch.rows] = np.clip(to_numpy(tensor), -limit, limit)
        self._answers[f"{batch.chunk}.known"][batch.rows] = True
        self._news = True

    def _make_room(self, number: int, leaves: list[Any]) -> bool:
        """Reserve a chunk's answers: in float32 where they fit, in float16 where only these do."""
        rows = len(self._samples.chunks[number])
        count = rows * sum(leaf[0].numel() for leaf in leaves)
        for kind in (np.float32, np.float16):
            size = count * np.dtype(kind).itemsize
            if size <= self._room:
                try:
                    empty = [np.zeros((rows, *tensor.shape[1:]), kind) for tensor in leaves]
                except MemoryError:
                    continue
                self._room -= size
                self._answers.update({f"{number}.{leaf}": x for leaf, x in zip(self.floats, empty, strict=True)})
                self._answers[f"{number}.known"] = np.zeros(rows, bool)
                return True
        return False

    def _recall(self) -> None:
        """Take in what an earlier lesson kept, if it is whole."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            found = load_file(self._path)
        except (OSError, SafetensorError):
            return
        for number, chunk in enumerate(self._samples.chunks):
            names = [*(f"{number}.{leaf}" for leaf in self.floats), f"{number}.known"]
            if all(name in found and len(found[name]) == len(chunk) for name in names):
                self._answers.update({name: found[name] for name in names})
                self._room -= sum(found[name].nbytes for name in names)


def _key(module: Any, samples: Samples) -> str:
    """A hash of the teacher's weights and of rows from all over the data."""
    digest = hashlib.sha256(type(module).__name__.encode())
    for name, tensor in module.state_dict().items():
        if hasattr(tensor, "shape"):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(np.ascontiguousarray(to_numpy(tensor)).tobytes())
    for chunk in samples.chunks:
        digest.update(f"{[(x.dtype, x.shape) for x in chunk.inputs]}".encode())
        some = chunk.rows(slice(None, None, -(-len(chunk) // FINGERPRINT_ROWS)))
        Samples((some,)).digest(digest)
    return digest.hexdigest()[:16]
