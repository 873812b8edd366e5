"""Parity: a few rows with the answers that the original and every rung gave, so that a copy can be proven.

Of further rows there are the answers alone: they tell how often two rungs agree, and give nobody's data away.

It is an uncompressed .npz of plain arrays: `input_0`, `original_0`, `<recipe key>_0`, `further_<recipe key>_0`, ... and
nothing else, so that no archive can be larger inside than it is outside.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from accelerando.errors import BundleError
from accelerando.signature import Array

PARITY_BYTES = 256 * 2**20
ARRAYS = 100_000
FURTHER = "further_"
SLACK = 1e-3  # of the answers' scale: what other processors' float arithmetic may change
SHARE = 0.5  # of what the rung itself differs from the original
# Of the answers' scale: what they may move on the very machine, and by the very versions, that stored them.  The same
# call gives the same bits there, in another process, beside other load and however its threads wait; this leaves room
# for one step of an 8-bit output, about an 80th, should a sum be rounded otherwise.
AT_HOME = 0.02


@dataclass(frozen=True)
class Parity:
    """Inputs, and the answers to them.

    Args:
        inputs: flat inputs of one batch, in the signature's order, each (n, ...).
        original: the original's flat outputs, in the signature's order.
        rungs: the same of every rung, by recipe key.
        further: every rung's answers to further rows, which are not stored themselves: the same rows for every rung, as
            drawn at random as those of `inputs`, and of the same shape.  Empty where there are none.
    """

    inputs: tuple[Array, ...]
    original: tuple[Array, ...]
    rungs: Mapping[str, tuple[Array, ...]]
    further: Mapping[str, tuple[Array, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Sequence[Array], original: str, answers: Mapping[str, Sequence[Array]], kept: int) -> Parity:
        """So many rows with their inputs, and of the others the answers alone, as far as all rungs gave any.

        Args:
            original: the original's key.
            answers: flat outputs by recipe key, to as many of the rows as the rung was asked.
        """
        most = min((len(x) for found in answers.values() for x in found), default=0)
        first = {key: tuple(x[:kept] for x in found) for key, found in answers.items()}
        further = {key: tuple(x[kept:most] for x in found) for key, found in answers.items()} if most > kept else {}
        return cls(tuple(x[:kept] for x in inputs), first[original], first, further)

    def deviation(self, key: str, outputs: Sequence[Array], at_home: bool = False) -> str | None:
        """What is wrong with outputs that the rung of this key gives now, or None.

        Floats must lie within `SLACK` of the answers' scale, or `SHARE` of the rung's own distance from the
        original, whichever is more (another processor may round an int8 model otherwise); whole numbers and
        booleans may differ in no larger share of places than the rung did from the original.

        A rung that was compressed much can become worse by points within that.  So `at_home`, where the machine and
        all versions are those that stored the answers, floats must lie within `AT_HOME` of their scale as well.

        Args:
            outputs: to all the rows, asked in one call, as they were when they were stored: a model whose 8-bit ranges
                are found at each call answers a row otherwise beside other rows.
        """
        stored = self.rungs[key]
        if len(outputs) != len(stored):
            return f"{len(outputs)} outputs where {len(stored)} were stored"
        for i, (now, then, original) in enumerate(zip(outputs, stored, self.original, strict=True)):
            if now.shape != then.shape or now.dtype != then.dtype:
                return f"output {i} is {now.dtype}{now.shape}, was {then.dtype}{then.shape}"
            if not then.size:
                continue
            where = ""
            if then.dtype.kind == "f":
                now, then, original = (x.astype(np.float64) for x in (now, then, original))
                scale, own = float(np.abs(then).max()), float(np.abs(then - original).max())
                allowed, found = max(SLACK * scale, SHARE * own), float(np.abs(now - then).max())
                if at_home and AT_HOME * scale < allowed:
                    allowed, where = AT_HOME * scale, " on the machine, and by the versions, that stored it"
            else:
                allowed, found = float((then != original).mean()), float((now != then).mean())
            if not found <= allowed:  # NaN too
                return f"output {i} differs by up to {found:.3g} from what was stored; {allowed:.3g} is allowed{where}"
        return None

    def to_bytes(self) -> bytes:
        """The content of `parity.npz`.

        Raises:
            BundleError: `parity`: there is more than a reader takes; store fewer rows.
        """
        arrays: dict[str, Array] = {}
        further = ((FURTHER + key, group) for key, group in self.further.items())
        for name, group in (("input", self.inputs), ("original", self.original), *self.rungs.items(), *further):
            arrays |= {f"{name}_{i}": np.ascontiguousarray(x) for i, x in enumerate(group)}
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        if len(stream.getbuffer()) > PARITY_BYTES:
            raise BundleError("parity", f"the rows take {len(stream.getbuffer())} bytes; at most {PARITY_BYTES}")
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Parity:
        """The rows of a `parity.npz`.

        Raises:
            BundleError: `parity`: it is not an uncompressed archive of plain arrays with the names above.
        """
        groups: dict[str, dict[int, Array]] = {}
        try:
            for name, array in _arrays(content):
                found = re.fullmatch(r"(input|original|(?:further_)?[0-9a-f]{12})_(\d{1,5})\.npy", name)
                if not found:
                    raise ValueError(f"{name[:80]!r} is not the name of an input or an output")
                groups.setdefault(found[1], {})[int(found[2])] = array
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, MemoryError) as error:
            raise BundleError("parity", f"parity.npz does not hold plain arrays: {error}") from error
        if any(sorted(group) != list(range(len(group))) for group in groups.values()) or not groups.get("input"):
            raise BundleError("parity", "parity.npz must hold input_0, input_1, ... without a gap; so of the outputs")
        rows = {name: tuple(group[i] for i in sorted(group)) for name, group in groups.items()}
        further = {name.removeprefix(FURTHER): rows.pop(name) for name in list(rows) if name.startswith(FURTHER)}
        parity = cls(rows.pop("input"), rows.pop("original", ()), rows, further)
        parity._check_further()
        return parity

    def _check_further(self) -> None:
        counts = {len(x) for group in self.further.values() for x in group if x.ndim}
        alike = all(
            key in self.rungs and [_row(x) for x in group] == [_row(x) for x in self.rungs[key]]
            for key, group in self.further.items()
        )
        if not alike or len(counts) > 1:
            raise BundleError("parity", "the further answers must be as many, and like the others, for every rung")


def _row(answers: Array) -> tuple[object, ...]:
    """What one row of answers is like."""
    return answers.dtype, answers.ndim, answers.shape[1:]


def _arrays(content: bytes) -> list[tuple[str, Array]]:
    """Every array of an archive; what its headers say is checked before anything is allocated."""
    found = []
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or len(entries) > ARRAYS:
            raise ValueError(f"it must hold at most {ARRAYS} uncompressed arrays")
        if sum(e.file_size for e in entries) > len(content):
            raise ValueError("it is larger inside than outside")
        if len({e.filename for e in entries}) < len(entries):
            raise ValueError("it holds a name twice")
        for entry in entries:
            data = archive.read(entry)
            stream = io.BytesIO(data)
            version = np.lib.format.read_magic(stream)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"{entry.filename[:80]!r} is of version {version} of the .npy format")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            if dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
                raise ValueError(f"{entry.filename[:80]!r} says {dtype}{shape}, but does not hold it")
            found.append((entry.filename, np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)))
    return found
