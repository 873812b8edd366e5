"""What outlives the process: how far a lesson went, and its weights.

A checkpoint is `progress.json`, which names the file of the weights that belong to it.  Each is written beside its
place, forced to the disk, and then renamed, the weights first: whatever moment the process dies at, there is a whole
checkpoint or none.  The optimizer's memory is not kept: it would double or triple the bytes, and a few gentle steps
give it back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from accelerando.disk import write_file
from accelerando.errors import BundleError, Reason, RefusalError
from accelerando.train.weights import Weights

MOST_JSON = 1 << 20
BEST = "best/"  # before the names of the best weights


@dataclass
class Progress:
    """How far a lesson went.

    Args:
        seconds: of training that were used.
        curve: (seconds, the metric's value) of every look.
        rate, chosen: the learning rate's peak, and by what it was chosen.
        steps, rows: made; seen.
        falls: how often the loss went astray.
        value: the metric of the best weights.
        done: nothing is left to be learned.
        log: what the lesson has to say once it is done.
    """

    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    rate: float = 0.0
    chosen: str = ""
    steps: int = 0
    rows: int = 0
    falls: int = 0
    value: float = 0.0
    done: bool = False
    log: list[str] = field(default_factory=list)


class Checkpoint:
    """The checkpoint of one lesson in a folder.

    Args:
        key: what the lesson depends on; a checkpoint of another key is not read.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def write(self, progress: Progress, **weights: Weights) -> None:
        """Keep the progress and several sets of weights, in place of what was kept before.

        Raises:
            RefusalError: NO_ROOM.
        """
        import torch
        from safetensors.torch import save

        whole = partial(torch.clone, memory_format=torch.contiguous_format)  # the same weights may be in two sets
        flat = {f"{part}/{name}": whole(t) for part, tensors in weights.items() for name, t in tensors.items()}
        file = f"weights-{progress.steps}{'-done' if progress.done else ''}.safetensors"
        data = {"key": self._key, "weights": file, **asdict(progress)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / file, save(flat))
            write_file(self._folder / "progress.json", json.dumps(data, allow_nan=False).encode())
        except BundleError as error:
            raise RefusalError(Reason.NO_ROOM, error.message) from error
        for stale in self._folder.glob("*weights-*"):
            if stale.name != file:
                stale.unlink(missing_ok=True)

    def read(self) -> tuple[Progress, dict[str, Weights]] | None:
        """The progress and its sets of weights; None where there is no whole one of this lesson."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            path = self._folder / "progress.json"
            if path.stat().st_size > MOST_JSON:
                return None
            data: dict[str, Any] = json.loads(path.read_bytes())
            file = data.pop("weights")
            if data.pop("key") != self._key or Path(file).name != file:
                return None
            progress = Progress(**data)
            flat = load_file(self._folder / file)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError):
            return None
        progress.curve = [(float(s), float(v)) for s, v in progress.curve]
        parts: dict[str, Weights] = {}
        for name, tensor in flat.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        return progress, parts


def finished(folder: Path) -> Path | None:
    """The file of the weights that a lesson in a folder ended with; None where it has not ended."""
    return next(folder.glob("weights-*-done.safetensors"), None)


def best_of(path: Path) -> Weights:
    """The best weights in a checkpoint's file.

    Raises:
        RefusalError: DAMAGED: it is no such file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        flat = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RefusalError(Reason.DAMAGED, f"{path.name} can't be read: {error}") from error
    return {name.removeprefix(BEST): tensor for name, tensor in flat.items() if name.startswith(BEST)}
