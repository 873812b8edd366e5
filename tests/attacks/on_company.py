"""Attacks on the files beside the manifest: parity, profile, journal."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.bundle import STUDENT_BYTES, Bundle

from .making import (
    attack,
    edit,
    npy,
    npz,
    reads_trials,
    replace_extra,
    verifies,
)

KEY = "0123456789ab"


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo pwned",)


@attack("parity", verifies)
def a_pickle_in_the_parity(path: Path) -> None:
    replace_extra(path, "parity", npz(input_0=npy(np.array([Payload()], dtype=object), allow_pickle=True)))


@attack("parity", verifies)
def a_bare_pickle_as_the_parity(path: Path) -> None:
    replace_extra(path, "parity", pickle.dumps(Payload()))


@attack("parity", verifies)
def an_archive_that_is_larger_inside(path: Path) -> None:
    replace_extra(path, "parity", npz(compressed=True, input_0=npy(np.zeros(5_000_000, np.float32))))


@attack("parity", verifies)
def a_header_that_lies_about_its_shape(path: Path) -> None:
    honest = npy(np.zeros((1000, 1000), np.uint8))[:200]
    replace_extra(path, "parity", npz(input_0=honest))


@attack("parity", verifies)
def an_array_with_a_path_for_a_name(path: Path) -> None:
    replace_extra(path, "parity", npz(**{"../input_0": npy(np.zeros(3))}))


@attack("differs", verifies)
def a_model_that_answers_otherwise(path: Path) -> None:
    bundle = Bundle.open(path)
    parity = bundle.parity
    assert parity is not None
    key = bundle.ladder.rungs[1].recipe.key
    changed = {**parity.rungs, key: tuple(x + 0.1 for x in parity.rungs[key])}
    replace_extra(path, "parity", type(parity)(parity.inputs, changed[key], changed).to_bytes())


@attack("journal", reads_trials)
def a_torn_line_in_the_middle_of_the_journal(path: Path) -> None:
    lines = (path / "trials.jsonl").read_text().splitlines()
    (path / "trials.jsonl").write_text("\n".join([lines[0][:100], *lines[1:]]) + "\n")


@attack("journal", reads_trials)
def a_trial_without_an_outcome(path: Path) -> None:
    line = json.loads((path / "trials.jsonl").read_text().splitlines()[0])
    del line["verified"]
    (path / "trials.jsonl").write_text(json.dumps(line) + "\n")


@attack("not-json", lambda path: Bundle.open(path).profile)
def a_profile_that_is_not_json(path: Path) -> None:
    replace_extra(path, "profile", b"__import__('os').system('id')")


def add_student(path: Path, /, key: str = KEY, content: bytes = b"weights", **said: Any) -> None:
    """Weights of a student, as someone who knows the format would add them."""
    digest = hashlib.sha256(content).hexdigest()
    file = {"path": f"students/{key}-{digest[:12]}.safetensors", "bytes": len(content), "sha256": digest}
    (path / "students").mkdir(exist_ok=True)
    (path / file["path"]).write_bytes(content)
    edit(path, lambda data: data["students"].append({**file, **said}))


@attack("hash")
def one_bit_of_a_student(path: Path) -> None:
    add_student(path)
    next(path.glob("students/*")).write_bytes(b"weighty")


@attack("too-big")
def a_student_that_fills_the_memory(path: Path) -> None:
    add_student(path, bytes=STUDENT_BYTES + 1)
    os.truncate(next(path.glob("students/*")), STUDENT_BYTES + 1)  # a hole: it takes no room on the disk


@attack("path")
def a_student_from_elsewhere(path: Path) -> None:
    add_student(path, path=f"students/../../{KEY}-{KEY}.safetensors")


@attack("link")
def a_student_that_lies_outside(path: Path) -> None:
    add_student(path)
    (path / "students").rename(path.parent / "outside")
    (path / "students").symlink_to(path.parent / "outside")


@attack("students")
def two_students_of_the_same_steps(path: Path) -> None:
    add_student(path)
    add_student(path, content=b"other weights")
