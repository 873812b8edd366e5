"""A program that forks while something computes: its child ends by `sys.exit`, and the parent goes on being served."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from accelerando import load
from accelerando.testing.fakes import fakes_known

ROW = np.ones((1, 4), np.float32)
HANGS = 60  # seconds


def forked(path: Path, *how: str) -> str:
    """How the child ended, as `os.waitpid` tells, and whether the parent was then answered as before.

    Args:
        path: of a bundle.
        how: `isolated`; `asks`, where the child asks the model too.
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
                assert (model(ROW) == before).all()
            sys.exit(0)
        model._cores.release()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{status} {(model(ROW) == before).all()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
