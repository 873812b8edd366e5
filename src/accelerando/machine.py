"""What this computer is: evidence holds only for the machine on which it was gathered."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

# The packages whose version changes how fast or how right a model runs.
PACKAGES = ("numpy", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "accelerando")

# What /proc/cpuinfo calls them -> what we call them; only what changes which kernels run.
ISA = {
    "avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16", "avx512_fp16": "avx512_fp16", "amx_tile": "amx", "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16", "asimd": "neon", "asimddp": "dotprod", "bf16": "bf16", "i8mm": "i8mm", "sve": "sve",
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What a figure depends on, as far as a program can see it.

    `cores` are those that this process may use; caches and memory are in bytes.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    caches: tuple[tuple[str, int], ...]
    memory_bytes: int
    accelerators: tuple[str, ...]
    system: str
    python: str
    versions: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def look(cls) -> Machine:
        """Look at the computer that this process runs on.  Imports nothing heavy; takes milliseconds."""
        name, flags = _cpu()
        return cls(
            cpu=name,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            isa=tuple(sorted({ISA[f] for f in flags if f in ISA})),
            caches=_caches(),
            memory_bytes=_memory_bytes(),
            accelerators=_accelerators(),
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            versions=tuple((name, version) for name in PACKAGES if (version := installed_version(name))),
        )

    def has(self, isa: str) -> bool:
        """Whether the processor has this instruction set (one of the values of `ISA`)."""
        return isa in self.isa

    @property
    def bf16(self) -> bool:
        """Whether bfloat16 products run natively."""
        return any(self.has(i) for i in ("avx512_bf16", "amx_bf16", "bf16"))

    @property
    def fp16(self) -> bool:
        """Whether float16 products run natively."""
        return self.has("avx512_fp16")

    @property
    def int8(self) -> bool:
        """Whether int8 dot products run natively."""
        return any(self.has(i) for i in ("avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm"))

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of threads worth trying: powers of two up to `cores`, and `cores` itself."""
        return tuple(sorted({*(2**i for i in range(self.cores.bit_length())), self.cores}))

    @property
    def key(self) -> str:
        """A short stable hash of everything here, versions included."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Machine) -> tuple[str, ...]:
        """What differs between two machines, each as `what: here, there`; empty if evidence carries over."""
        mine, theirs = self.to_json(), other.to_json()
        rows = [
            f"{k}: {mine[k]}, was {theirs[k]}" for k in ("cpu", "cores", "isa", "accelerators") if mine[k] != theirs[k]
        ]
        versions, before = dict(self.versions), dict(other.versions)
        rows += [
            f"{name}: {versions.get(name, 'missing')}, was {before[name]}"
            for name in before
            if versions.get(name) != before[name]
        ]
        return tuple(rows)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["caches"], data["versions"] = dict(self.caches), dict(self.versions)
        return json.loads(json.dumps(data))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Machine:
        return cls(
            **{
                **data,
                "isa": tuple(data["isa"]),
                "accelerators": tuple(data["accelerators"]),
                "caches": tuple((k, v) for k, v in data["caches"].items()),
                "versions": tuple((k, v) for k, v in data["versions"].items()),
            }
        )

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.memory_bytes / 2**30:.0f} GiB, "
            f"{' '.join(self.isa) or 'no SIMD found'}"
        )


@cache
def installed_version(package: str) -> str | None:
    """The version of an installed distribution, without importing it; as it was when it was first asked for."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    except OSError:
        pass  # not Linux: the name alone
    return name, flags


def _caches() -> tuple[tuple[str, int], ...]:
    """Caches of the first core, in bytes."""
    found: dict[str, int] = {}
    unit = {"K": 2**10, "M": 2**20}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((entry / f).read_text().strip() for f in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size[:-1]) * unit[size[-1]] if size[-1] in unit else int(size)
    return tuple(found.items())


def _memory_bytes() -> int:
    """What this process may use: the smaller of the machine's memory and its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):
            continue
    return total


def _accelerators() -> tuple[str, ...]:
    """NVIDIA cards by their driver's own list; importing torch for this would cost a second."""
    found = []
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")) if sys.platform == "linux" else ():
        for line in card.read_text().splitlines():
            if line.startswith("Model:"):
                found.append(line.partition(":")[2].strip())
    return tuple(found)
