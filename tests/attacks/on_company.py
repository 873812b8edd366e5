"""Attacks on the files beside the manifest: parity, profile, journal."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.bundle import Bundle

from .making import (
    attack,
    npy,
    npz,
    reads_trials,
    replace_extra,
    verifies,
)


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
