"""Memory of the process that asks, in bytes."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The most that the process has held resident since it began."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
