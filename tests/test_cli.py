"""The command line: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from accelerando import cli
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.bundle import Bundle
from accelerando.errors import UsageError
from accelerando.recipe import Recipe
from accelerando.signature import Port, Signature
from accelerando.testing.bundles import write_bundle

SIGNATURE = Signature(
    (Port("x", "float32", ("batch", 16)),), (Port("logits", "float32", ("batch", 4)),), ("x",), 1,
    {"x": {"leaf": 0}}, {"leaf": 0},
)  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path, onnx_model: Path) -> Path:
    recipes = [Recipe((), Onnxruntime()), Recipe((), Onnxruntime(threads=1))]
    rows = [np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)]
    write_bundle(tmp_path / "bundle", recipes=recipes, content=onnx_model, signature=SIGNATURE, inputs=rows)
    return tmp_path / "bundle"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a command line; gives status, output and errors."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["accelerando", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out = capsys.readouterr()
        return int(left.value.code or 0), out.out, out.err

    return run


COMMANDS = ("demo", "optimize", "profile", "report", "bench", "verify", "run", "refresh", "serve", "simulate", "export",
            "doctor")  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(call, command: str) -> None:
    status, out, _ = call(command, "--help")
    assert status == 0
    assert "Usage" in out


def test_report_shows_the_bundle_and_writes_the_page(call, bundle: Path, tmp_path: Path) -> None:
    status, out, _ = call("report", bundle, "--html", tmp_path / "page.html")
    assert status == 0
    assert "The ladder" in out
    assert "<html" in (tmp_path / "page.html").read_text()


def test_verify_says_what_it_looked_at_and_fails_on_a_changed_file(call, bundle: Path) -> None:
    status, out, _ = call("verify", bundle)
    assert status == 0
    assert "parity" in out
    victim = next(bundle.glob("rungs/*/model.onnx"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    status, _, err = call("verify", bundle)
    assert status == 3
    assert "hash" in err


TEACHING = """
import numpy as np
import torch

def build():
    return torch.nn.Linear(4, 3)

def data():
    return np.zeros((9, 4), np.float32), np.zeros(9, np.int64)

def loss(answer, targets):
    return answer.square().mean()

def augment(inputs):
    return inputs

def of_one(answer):
    return answer
"""


@pytest.fixture
def teaching(tmp_path: Path) -> str:
    name = f"teaching_{tmp_path.name.replace('-', '_')}"  # a module is imported once in a process
    (tmp_path / f"{name}.py").write_text(TEACHING)
    return str(tmp_path / f"{name}.py")


@pytest.mark.parametrize("command", ["optimize", "refresh"])
def test_the_owners_ways_to_teach_reach_the_library(
    call, teaching: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    from accelerando import pipeline, renewal

    given: dict[str, object] = {}

    def stop(*args: object, **named: object) -> None:
        given.update(named)
        raise UsageError("far enough")

    monkeypatch.setattr(pipeline, "accelerate", stop)
    monkeypatch.setattr(renewal, "refresh", stop)
    model, data = f"{teaching}:build", f"{teaching}:data"
    words = ["--data", data, "--train", data, "--loss", f"{teaching}:loss", "--augment", f"{teaching}:augment"]
    start = [command, model] if command == "optimize" else [command, tmp_path, "--model", model]
    status, _, err = call(*start, *words, "--into", tmp_path / "new")
    assert (status, "far enough" in err) == (2, True)
    loss, augment = given["loss"], given["augment"]
    assert callable(loss)
    assert callable(augment)
    assert (loss.__name__, augment((1,))) == ("loss", (1,))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--loss", "{}:loss"), "give --train"),
        (("--train", "{}:data", "--loss", "{}:of_one"), "the model's answer and the targets"),
        (("--train", "{}:data", "--augment", "{}:loss"), "a tuple of tensors"),
        (("--train", "{}:data", "--augment", "{}:build"), "a tuple of tensors"),
        (("--train", "{}:data", "--loss", "{}:nothing"), "no function 'nothing'"),
        (("--train", "{}:data", "--loss", "mine"), "FILE.py:FUNCTION"),
    ],
)
def test_a_way_to_teach_that_can_not_be_is_refused(
    call, teaching: str, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    model, data = f"{teaching}:build", f"{teaching}:data"
    options = [word.format(teaching) for word in words]
    status, _, err = call("optimize", model, "--data", data, "--into", tmp_path / "new", *options)
    assert status == 2
    assert told in err
    assert not (tmp_path / "new").exists()


def test_run_answers_a_file_of_inputs(call, bundle: Path, tmp_path: Path) -> None:
    x = np.zeros((3, 16), np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    status, _, _ = call("run", bundle, tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    assert status == 0
    with np.load(tmp_path / "out.npz") as out:
        assert out["logits"].shape == (3, 4)


def test_run_says_which_input_is_missing(call, tmp_path: Path, bundle: Path) -> None:
    np.savez(tmp_path / "in.npz", a=np.zeros(3), b=np.zeros(3))
    status, _, err = call("run", bundle, tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    assert status == 2
    assert "the model takes x" in err


def test_objects_in_a_file_of_inputs_are_never_unpickled(call, tmp_path: Path, bundle: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.array([{"a": 1}], dtype=object))
    status, _, err = call("run", bundle, tmp_path / "in.npz", "--out", tmp_path / "out.npz")
    assert status == 2
    assert "plain arrays" in err


@pytest.mark.slow
def test_bench_measures_again(call, bundle: Path) -> None:
    status, out, _ = call("bench", bundle)
    assert status == 0
    assert out.count("ONNX Runtime") == 2
    assert "was" in out


def test_simulate_tells_what_each_policy_would_do(call, bundle: Path, tmp_path: Path) -> None:
    trace = "gamma(rate=150, cv2=4, seconds=5)"
    page = tmp_path / "page.html"
    status, out, _ = call("simulate", bundle, "--trace", trace, "--goal", "p99 <= 100ms", "--html", page)
    assert status == 0
    assert "governor, balanced" in out
    assert "rung 0 always" in out
    assert "<html" in page.read_text()
    status, _, err = call("simulate", bundle, "--trace", "gamma(speed=1)", "--goal", "p99 <= 100ms")
    assert status == 2
    assert "gamma" in err


def test_export_writes_a_rung_for_another_server(call, bundle: Path, tmp_path: Path) -> None:
    status, out, _ = call("export", bundle, tmp_path / "models", "--to", "triton", "--rung", "1")
    assert status == 0
    assert "config.pbtxt" in out
    assert list((tmp_path / "models").rglob("model.onnx"))
    status, _, err = call("export", bundle, tmp_path / "models", "--to", "triton")
    assert status == 2
    assert "models" in err


def test_doctor_names_the_machine_and_every_plugin(call) -> None:
    status, out, _ = call("doctor")
    assert status == 0
    for word in ("cores", "backend onnxruntime", "technique export_onnx", "torch"):
        assert word in out


def test_what_is_not_a_bundle_is_said(call, tmp_path: Path) -> None:
    status, _, err = call("report", tmp_path)
    assert status == 3
    assert "not-a-bundle" in err


def test_a_target_that_is_not_there_does_not_import_or_fails_is_one_line(call, tmp_path: Path) -> None:
    (tmp_path / "broken_module.py").write_text("import no_such_thing\n")
    (tmp_path / "fine_module.py").write_text("def build():\n    raise RuntimeError('no weights')\n")
    for target, words in (
        ("nowhere.py:build", "is not a file"),
        (f"{tmp_path}/broken_module.py:build", "no_such_thing"),
        (f"{tmp_path}/fine_module.py:construct", "it has build"),
        (f"{tmp_path}/fine_module.py:build", "no weights"),
        ("model", "FILE.py:FUNCTION"),
    ):
        status, out, err = call("optimize", target, "--data", "rows.npz", "--into", tmp_path / "b", "--quiet")
        assert status == 2
        assert words in err
        assert "Traceback" not in out + err


def test_a_folder_with_a_search_is_not_gone_on_with_unasked(call, bundle: Path) -> None:
    status, _, err = call("optimize", "model.onnx", "--data", "rows.npz", "--into", bundle)
    assert status == 2
    assert "--resume" in err


@pytest.mark.slow
def test_optimize_a_model_from_the_command_line(call, tmp_path: Path, onnx_model: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", x=rng.standard_normal((100, 16)).astype(np.float32))
    status, out, err = call(
        "optimize", onnx_model, "--data", tmp_path / "rows.npz", "--goal", "drop <= 1%", "--budget", "15s",
        "--into", tmp_path / "b", "--html", tmp_path / "page.html",
    )  # fmt: skip
    assert status == 0
    assert "The ladder" in out
    assert "best so far" in err or "tried" in err
    assert "best so far" in err or "tried" in err
    assert (tmp_path / "page.html").exists()
    again = Bundle.open(tmp_path / "b").run["command"]
    assert run_again(call, again, tmp_path / "rows.npz") == 0
    refreshing = ("--model", onnx_model, "--data", tmp_path / "rows.npz", "--into", tmp_path / "new", "--budget", "10s")
    assert call("refresh", tmp_path / "b", *refreshing)[0] == 0
    again = Bundle.open(tmp_path / "new").run["command"]
    assert again.startswith("accelerando refresh")
    assert run_again(call, again, tmp_path / "rows.npz") == 0


def run_again(call, line: str, data: Path) -> int:
    """The status of the command that a report shows, the user's data put in."""
    _, *words = shlex.split(line)
    return call(*(data if word == "..." else word for word in words))[0]
