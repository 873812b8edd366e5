"""`accelerate` from end to end, on a small ONNX model, with well-behaved and faulty candidates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import accelerando as acc
from accelerando import pipeline
from accelerando.errors import BundleError, DataError, GoalError, ModelError, Reason, UsageError
from accelerando.plugins import find
from accelerando.report.progress import Quiet
from accelerando.search.log import Journal
from accelerando.trial import Refused

Rows = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, toys: None) -> None:
    """Only ONNX Runtime, the toy backend and the toy technique: a search of seconds."""

    def few(kind: str) -> dict[str, Any]:
        names = {"techniques": ["toy_technique"], "backends": ["onnxruntime", "toy_backend"]}[kind]
        return {name: find(kind, name) for name in names}

    monkeypatch.setattr(pipeline, "discover", few)


@pytest.mark.slow
def test_a_search_ends_in_a_bundle_that_answers_as_the_model_does(
    small: None, onnx_model: Path, labelled: Rows, tmp_path: Path
) -> None:
    result = acc.accelerate(
        str(onnx_model), labelled, "drop <= 2%", metric="accuracy", budget=30, into=tmp_path / "b", progress=False
    )
    assert result.verdict in ("met", "cannot tell", "not met")
    assert result.best.certified
    assert result.best.evidence.split == "certify"
    assert not (tmp_path / "b" / "work").exists()
    assert "ladder" in str(result)
    assert json.loads(result.to_json())["verdict"] == result.verdict
    page = result.report(tmp_path / "report.html").read_text()
    assert "<html" in page
    with acc.load(tmp_path / "b") as fast:
        out = fast(labelled[0][:5])
        assert out[0].shape == (5, 4) if isinstance(out, tuple) else out.shape == (5, 4)

    faults = {t.recipe.backend.knobs.get("fault"): t.outcome for t in result.bundle.trials if t.verified is None}
    seen = {fault: outcome.reason for fault, outcome in faults.items() if isinstance(outcome, Refused) and fault}
    expected = {
        "segfault": Reason.CRASHED, "nan": Reason.NOT_FINITE, "shape": Reason.WRONG_OUTPUT,
        "raise": Reason.CRASHED, "partial": Reason.DAMAGED, "memory": Reason.OUT_OF_MEMORY, "hang": Reason.TIMED_OUT,
    }  # fmt: skip
    assert seen.items() <= expected.items()


class Watching(Quiet):
    """Calls a function after each trial."""

    def __init__(self, after: Any) -> None:
        self.after, self.count = after, 0

    def found(self, trial: Any, best: Any) -> None:
        self.count += 1
        self.after(self.count)


@pytest.mark.slow
def test_an_interrupt_leaves_the_best_so_far_and_the_next_call_goes_on(
    small: None, onnx_model: Path, labelled: Rows, tmp_path: Path
) -> None:
    def interrupt(count: int) -> None:
        if count == 2:
            raise KeyboardInterrupt

    call = {"metric": "accuracy", "into": tmp_path / "b"}
    result = acc.accelerate(str(onnx_model), labelled, "drop <= 2%", budget=60, progress=Watching(interrupt), **call)
    assert result.bundle.run["why_stopped"] == "interrupted"
    assert not result.best.certified
    acc.Bundle.open(tmp_path / "b")
    before = {t.recipe.key for t in result.bundle.trials}
    watching = Watching(lambda count: None)
    again = acc.accelerate(str(onnx_model), labelled, "drop <= 2%", budget=12, progress=watching, **call)
    assert before <= {t.recipe.key for t in again.bundle.trials}
    assert again.best.certified


SCRIPT = """
    import sys
    sys.path.insert(0, {toys!r})
    import numpy as np
    import accelerando as acc
    from accelerando import pipeline
    from accelerando.plugins import find
    names = {{"techniques": [], "backends": ["onnxruntime", "toy_backend"]}}
    pipeline.discover = lambda kind: {{n: find(kind, n) for n in names[kind]}}
    rows = np.load({rows!r})
    data = rows["x"], rows["y"]
    acc.accelerate({model!r}, data, "drop <= 2%", metric="accuracy", budget=100, into={into!r}, progress=False)
"""


@pytest.mark.slow
def test_a_search_goes_on_after_kill_nine_with_at_most_the_running_trial_lost(
    small: None, onnx_model: Path, labelled: Rows, tmp_path: Path
) -> None:
    np.savez(tmp_path / "rows.npz", x=labelled[0], y=labelled[1])
    into = tmp_path / "b"
    script = textwrap.dedent(SCRIPT).format(
        toys=str(Path(__file__).parent / "toys"), rows=str(tmp_path / "rows.npz"), model=str(onnx_model), into=str(into)
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = Journal(into / "trials.jsonl")
    deadline = time.monotonic() + 120
    while len(journal.read()) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {t.recipe.key for t in journal.read()}
    assert len(before) >= 2
    acc.Bundle.open(into)
    watching = Watching(lambda count: None)
    result = acc.accelerate(
        str(onnx_model), labelled, "drop <= 2%", metric="accuracy", budget=15, into=into, progress=watching
    )
    assert before <= {t.recipe.key for t in result.bundle.trials}
    assert result.best.certified


@pytest.mark.slow
def test_a_folder_of_another_model_is_refused_and_left_alone(
    small: None, onnx_model: Path, labelled: Rows, tmp_path: Path
) -> None:
    into = tmp_path / "b"
    acc.accelerate(str(onnx_model), labelled, "drop <= 2%", metric="accuracy", budget=8, into=into, progress=False)
    before = (into / "manifest.json").read_bytes()
    other = (labelled[0] + 1, labelled[1])
    with pytest.raises(BundleError, match="other-model"):
        acc.accelerate(str(onnx_model), other, "drop <= 2%", metric="accuracy", budget=8, into=into, progress=False)
    assert (into / "manifest.json").read_bytes() == before


def test_the_callers_mistakes_are_errors_before_any_work(onnx_model: Path, labelled: Rows, tmp_path: Path) -> None:
    def call(model: Any = str(onnx_model), data: Any = labelled, goal: str = "drop <= 1%", **more: Any) -> None:
        acc.accelerate(model, data, goal, **{"into": tmp_path / "b", "budget": 10, "progress": False, **more})

    x, y = labelled
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (GoalError, "speedup", {"goal": "speedup >= 4, speedup <= 2"}),
        (GoalError, r"\^", {"goal": "spedup >= 4"}),
        (UsageError, "budget", {"budget": "soon"}),
        (ModelError, "not a file", {"model": str(tmp_path / "none.onnx")}),
        (ModelError, "int", {"model": 3}),
        (ModelError, r"rejects the inputs float32\(1, 15\)", {"data": (x[:, :15], y)}),
        (DataError, "empty", {"data": (x[:0], y[:0])}),
        (DataError, "differ in length", {"data": (x, y[:-1])}),
        (DataError, "NaN", {"data": (np.where(x > 3, np.nan, x).astype(np.float32), y)}),
        (DataError, "does not fit", {"metric": "mae"}),
        (DataError, "no metric", {"metric": "beauty"}),
        (UsageError, "not a bundle", {"into": tmp_path / "full"}),
        (UsageError, "is a file", {"into": tmp_path / "full" / "thesis.txt"}),
    ]
    for error, words, change in cases:
        with pytest.raises(error, match=words):
            call(**change)
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_no_room_on_the_disk_is_said_before_any_work(
    onnx_model: Path, labelled: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match="MB free"):
        acc.accelerate(str(onnx_model), labelled, into=tmp_path / "b", budget=10, progress=False)
    assert not (tmp_path / "b").exists()


def test_two_searches_in_one_folder_keep_apart(onnx_model: Path, labelled: Rows, tmp_path: Path) -> None:
    from accelerando.search.site import _lock

    (tmp_path / "b" / "work").mkdir(parents=True)
    held = _lock(tmp_path / "b" / "work" / "lock")
    with pytest.raises(UsageError, match="another search"):
        acc.accelerate(str(onnx_model), labelled, into=tmp_path / "b", budget=10, progress=False)
    os.close(held)


def test_a_torn_last_line_of_the_journal_is_tolerated_and_cut(toys: None, tmp_path: Path) -> None:
    from accelerando.recipe import Recipe
    from accelerando.trial import Trial

    journal = Journal(tmp_path / "trials.jsonl")
    backend = find("backends", "toy_backend")
    trials = [Trial(Recipe((), backend(fault=f)), Refused(Reason.CRASHED, "x")) for f in ("nan", "hang", "raise")]
    journal.append(trials[0])
    with journal.path.open("ab") as stream:
        stream.write(b'{"recipe": {"steps": [], "back')
    assert journal.read() == tuple(trials[:1])
    journal.append(trials[1])
    journal.append(trials[2])
    assert journal.read() == tuple(trials)
