"""Memory of the process that asks, in bytes."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def resident_bytes() -> int:
    """What the process holds now: its proportional set size, so that pages shared with others count by share."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return peak_bytes()


def peak_bytes() -> int:
    """The most that the process has held resident since it began, or since `forget_peak`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def forget_peak() -> None:
    """Start the peak anew from what is held now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
