"""A program that forks while something computes: its child ends by `sys.exit`, and the parent goes on being served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from accelerando import load
from accelerando.testing.fakes import fakes_known

ROW = np.ones((1, 4), np.float32)
HANGS = 60  # seconds
THREADS = 4


def forked(path: Path, *how: str) -> str:
    """How the child ended, as `os.waitpid` tells, and whether the parent was then answered as before.

    Args:
        path: of a bundle.
        how: `isolated`; `asks`, where threads of the child ask the model too, all at once.
    """
    program = [sys.executable, "-W", "ignore", __file__, str(path), *how]
    return subprocess.run(program, check=True, capture_output=True, text=True, timeout=5 * HANGS).stdout.strip()


def main(path: str, *how: str) -> None:
    with fakes_known(), load(path, goal="p99 <= 60s", audit=0, isolated="isolated" in how) as model:
        before = model(ROW)
        model._cores.acquire()  # as if something computed: in the child, that never ends
        child = os.fork()
        if child == 0:
            signal.alarm(HANGS)
            if "asks" in how:
                with ThreadPoolExecutor(THREADS) as pool:
                    assert all((y == i * before).all() for i, y in enumerate(pool.map(model, rows())))
                assert [thread.name for thread in threading.enumerate()].count("accelerando-executor") == 1
            sys.exit(0)
        model._cores.release()
        status, fine = (0, 0), True
        while status == (0, 0):
            fine = fine and all((model(x) == i * before).all() for i, x in enumerate(rows()))
            status = os.waitpid(child, os.WNOHANG)
        sys.stdout.write(f"{status[1]} {fine}")


def rows() -> list[np.ndarray[Any, Any]]:
    return [i * ROW for i in range(4 * THREADS)]


if __name__ == "__main__":
    main(*sys.argv[1:])
