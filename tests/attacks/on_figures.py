"""Attacks on evidence, signature and verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .making import (
    attack,
    edit,
    edit_evidence,
    packed,
    verifies,
)


@attack("evidence")
def an_array_that_says_it_is_huge(path: Path) -> None:
    edit_evidence(path, rounds=packed(np.ones((4, 2)), shape=[2**40, 2**30]))


@attack("evidence")
def an_array_that_unpacks_for_ever(path: Path) -> None:
    edit_evidence(path, seconds=packed(np.ones(3_000_000), shape=[20]))


@attack("evidence")
def an_array_that_is_not_packed(path: Path) -> None:
    edit_evidence(path, seconds={"shape": [3], "f4": "AAAABBBBCCCC"})


@attack("evidence")
def scores_of_other_samples(path: Path) -> None:
    edit_evidence(path, scores=packed(np.ones((7, 1))))


@attack("evidence")
def an_answer_in_no_time(path: Path) -> None:
    edit_evidence(path, rounds=packed(np.zeros((20, 2))))


@attack("summary", verifies)
def a_summary_that_says_more_than_the_evidence(path: Path) -> None:
    better = {"low": 9.0, "mid": 9.5, "high": 10.0, "confidence": 0.95}
    edit(path, lambda data: data["rungs"][1]["summary"].update(speedup=better))


@attack("verdict", verifies)
def a_verdict_that_was_turned_round(path: Path) -> None:
    edit(path, lambda data: data["verdict"].update(outcome="not met"))


@attack("signature")
def a_leaf_beyond_the_ports(path: Path) -> None:
    edit(path, lambda data: data["signature"].update(result={"leaf": 5}))


@attack("signature")
def a_node_of_no_known_kind(path: Path) -> None:
    edit(path, lambda data: data["signature"].update(result={"call": "os.system", "args": ["id"]}))


@attack("signature")
def an_input_that_is_passed_nowhere(path: Path) -> None:
    edit(path, lambda data: data["signature"]["inputs"].append(data["signature"]["inputs"][0]))
