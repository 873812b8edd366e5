"""Memory of processes, in bytes: what they hold, what they may, and what they can give back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARGIN = 0.9  # of the room that is left; pages that were asked for before, but not touched, take some of it yet


def peak_bytes() -> int:
    """The most that the process has held resident since it began."""
    with contextlib.suppress(OSError, KeyError):
        return _facts("self")["VmHWM"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident_bytes(pid: int) -> int:
    """All that a process has in memory, pages of files among it; 0 where this system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def held_bytes(pid: int | str = "self") -> int:
    """What a process holds resident and can't be without: not the pages of files, which may be read again.

    Raises:
        OSError: it is gone, or this is not Linux.
    """
    facts = _facts(pid)
    return facts.get("RssAnon", 0) + facts.get("RssShmem", 0)


@contextmanager
def kept_within(limit: int | None) -> Iterator[None]:
    """Meanwhile memory that would take this process past a limit is not to be had, as if there were no more.

    An allocation then fails (a `MemoryError`, or a library's own), and whoever asked may ask for less; the parent's
    limit would end the process.  Done by RLIMIT_DATA, which counts writable pages of its own as soon as they are asked
    for (setrlimit(2)); elsewhere than on Linux, nothing is done.

    Args:
        limit: bytes that it may hold; None for no limit.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    most = [bound for bound in before if bound != resource.RLIM_INFINITY]
    with contextlib.suppress(OSError, KeyError):
        if limit is not None:
            room = int(MARGIN * max(0, limit - held_bytes()))
            resource.setrlimit(resource.RLIMIT_DATA, (min([_facts("self")["VmData"] + room, *most]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
        give_back()


def give_back() -> None:
    """Return this process's freed memory to the system, which C libraries do by themselves only when asked."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _facts(pid: int | str) -> dict[str, int]:
    """The sizes that the kernel tells of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest}
