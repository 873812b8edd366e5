"""Data as users have it, as chunks: arrays, tensors, loaders, batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from accelerando.errors import DataError
from accelerando.signature import Signature, flatten, to_numpy
from accelerando.workload import EVAL_ROWS, Chunk, Samples

LABELS = ("labels", "label", "targets", "target", "y")  # keys of a dict batch that are never inputs
LEAST_ROWS = 8


@dataclass(frozen=True)
class Batch:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any

    @classmethod
    def read(cls, value: Any, required: int, where: str) -> Batch:
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


def gather(data: Any, required: int, where: str) -> tuple[Batch, Samples]:
    """The first batch as it was given, and all rows as chunks of one shape each."""
    first: Batch | None = None
    groups: dict[Any, list[Chunk]] = {}
    for batch in _each(data, required, where):
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


def _each(data: Any, required: int, where: str) -> Iterator[Batch]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.utils.data.Dataset):
        data = torch.utils.data.DataLoader(data, batch_size=EVAL_ROWS)
    if hasattr(data, "shape") or isinstance(data, Mapping):
        yield Batch.read(data, required, where)
    elif isinstance(data, tuple) and len(data) == 2:
        inputs, targets = data
        yield replace(Batch.read(inputs, 0 if hasattr(inputs, "shape") else len(inputs), where), targets=targets)
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        for batch in data:
            yield Batch.read(batch, required, where)
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


def check_rows(rows: Samples, where: str, least: int) -> None:
    if len(rows) < least:
        raise DataError(f"{where} holds {len(rows)} samples; at least {least} are needed to split and to judge")
    for chunk in rows.chunks:
        for kind, array in [("inputs", x) for x in chunk.inputs] + [("targets", chunk.targets)]:
            if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = int((~np.isfinite(array.reshape(len(array), -1))).any(axis=1).sum())
                raise DataError(f"{where}: the {kind} hold NaN or infinity in {bad} samples; clean or drop them first")
            if array is not None and array.dtype.kind not in "fiub":
                raise DataError(f"{where}: the {kind} are of type {array.dtype}; numbers or booleans are needed")


def check_ports(signature: Signature, rows: Samples, where: str) -> None:
    for chunk in rows.chunks:
        for port, array in zip(signature.inputs, chunk.inputs, strict=False):
            if not port.fits(array):
                raise DataError(f"{where}: an input is {array.dtype}{array.shape}, but data gave {port}")
