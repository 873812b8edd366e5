"""Outside clients, each in a venv of its own at the root of the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CAN_NOT_BE_HAD = 75  # how scripts/client-venv ends where the registry can't be reached


def programs_of(name: str) -> Path:
    """The folder of the venv's programs; it is made if it is not there, and where it can't be, the test is skipped."""
    command = [str(ROOT / "scripts" / "client-venv"), name]
    made = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if made.returncode == CAN_NOT_BE_HAD:
        pytest.skip(made.stderr.strip().splitlines()[-1])
    assert made.returncode == 0, made.stderr
    return ROOT / f".venv-{name}" / "bin"
