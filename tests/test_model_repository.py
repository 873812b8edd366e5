from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.backends.openvino import Openvino
from accelerando.bundle import Bundle
from accelerando.errors import BundleError, UsageError
from accelerando.model_repository import export_bundle
from accelerando.recipe import Recipe
from accelerando.signature import Port, Signature
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fake_recipe, fakes_known

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3)
ORT = Recipe((), Onnxruntime(threads=2, optimization="basic", arena=False))
BATCHED = Recipe((), Onnxruntime(batch=1))
OPENVINO = Recipe((), Openvino(threads=1, streams=1))
TWO = Signature(
    inputs=(Port("x", "float32", ("batch", 4)), Port("gain", "float32", ("batch",))),
    outputs=(Port("logits", "float32", ("batch", 3)), Port("ids", "int64", ("batch",))),
    parameters=("x", "gain"),
    positional=2,
    arguments={"x": {"leaf": 0}, "gain": {"leaf": 1}},
    result={"tuple": [{"leaf": 0}, {"leaf": 1}]},
)
ROWS = [np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32), np.linspace(1, 2, 6, dtype=np.float32)]


def model(path: Path, batch: int | str = "batch") -> Path:
    """(x, gain) -> x @ WEIGHT * gain, and its greatest class; the outputs' names differ from the signature's."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Unsqueeze", ["gain", "last"], ["column"]),
            helper.make_node("Mul", ["product", "column"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        ],
        "two",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4]),
            helper.make_tensor_value_info("gain", TensorProto.FLOAT, [batch]),
        ],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 3]),
            helper.make_tensor_value_info("best", TensorProto.INT64, [batch]),
        ],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array([1]), "last")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle named `my digits` of an OpenVINO rung and two of ONNX Runtime; the best is the last."""
    place = tmp_path_factory.mktemp("export")
    recipes = [OPENVINO, BATCHED, ORT]
    content = model(place / "m" / "model.onnx")
    write_bundle(place / "my digits", recipes=recipes, content=content, signature=TWO, inputs=ROWS)
    return place / "my digits"


# --- a reader of protobuf's text format, enough for a config ------------------------------------------------------


def parsed(text: str) -> dict[str, list[Any]]:
    """Field -> its values in order; a message is a dict again."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[A-Za-z_0-9.+-]+', text)
    assert "".join(tokens) == re.sub(r"\s+(?=([^\"]*\"[^\"]*\")*[^\"]*$)", "", text), "it holds something else"
    message, rest = _message(tokens)
    assert not rest
    return message


def _message(tokens: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    found: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        name, tokens = tokens[0], tokens[1:]
        assert re.fullmatch(r"[a-z_]+", name)
        if tokens[0] == ":":
            tokens = tokens[1:]
        if tokens[0] == "{":
            value, tokens = _message(tokens[1:])
            assert tokens[0] == "}"
            values, tokens = [value], tokens[1:]
        elif tokens[0] == "[":
            end = tokens.index("]")
            values, tokens = [_scalar(t) for t in tokens[1:end] if t != ","], tokens[end + 1 :]
        else:
            values, tokens = [_scalar(tokens[0])], tokens[1:]
        found.setdefault(name, []).extend(values)
    return found, tokens


def _scalar(token: str) -> Any:
    return json.loads(token) if token[0] in '"-0123456789' else token


# --- what is written ----------------------------------------------------------------------------------------------


def test_triton_gets_a_repository_that_says_what_the_signature_says(folder: Path, tmp_path: Path) -> None:
    written = export_bundle(folder, "triton", tmp_path / "models")
    names = [path.relative_to(tmp_path / "models").as_posix() for path in written]
    assert names == ["README.md", "my_digits/1/model.onnx", "my_digits/config.pbtxt", "sample.npz"]
    config = parsed((tmp_path / "models/my_digits/config.pbtxt").read_text())
    assert (config["name"], config["backend"], config["max_batch_size"]) == (["my_digits"], ["onnxruntime"], [64])
    assert config["input"] == [
        {"name": ["x"], "data_type": ["TYPE_FP32"], "dims": [4]},
        {"name": ["gain"], "data_type": ["TYPE_FP32"], "dims": [1], "reshape": [{"shape": []}]},
    ]
    assert config["output"] == [
        {"name": ["scores"], "data_type": ["TYPE_FP32"], "dims": [3]},
        {"name": ["best"], "data_type": ["TYPE_INT64"], "dims": [1], "reshape": [{"shape": []}]},
    ]
    settings = {p["key"][0]: p["value"][0]["string_value"][0] for p in config["parameters"]}
    assert settings == {"intra_op_thread_count": "2", "enable_mem_arena": "0"}
    assert config["optimization"] == [{"graph": [{"level": [-1]}]}]


@pytest.mark.parametrize(("to", "place"), [("triton", "digits/1"), ("ovms", "digits/1"), ("onnx", ".")])
def test_the_exported_file_answers_as_the_rung_does(folder: Path, tmp_path: Path, to: str, place: str) -> None:
    export_bundle(Bundle.open(folder), to, tmp_path / "out", name="digits")
    session = onnxruntime.InferenceSession(tmp_path / "out" / place / "model.onnx", providers=["CPUExecutionProvider"])
    fresh = [np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32), np.ones(5, np.float32)]
    bundle = Bundle.open(folder)
    runner = bundle.start(bundle.ladder.rungs[bundle.best])
    for ours, theirs in zip(
        session.run(None, dict(zip(["x", "gain"], fresh, strict=True))), runner(fresh), strict=True
    ):
        assert np.allclose(ours, theirs, atol=1e-5)
    with np.load(tmp_path / "out" / "sample.npz", allow_pickle=False) as sample:
        assert sorted(sample) == ["input_gain", "input_x", "output_best", "output_scores"]
        answers = session.run(None, {"x": sample["input_x"], "gain": sample["input_gain"]})
        assert np.allclose(answers[0], sample["output_scores"], atol=1e-5)


def test_a_fixed_batch_is_an_axis_like_others(tmp_path: Path) -> None:
    fixed = Signature(
        (Port("x", "float32", (6, 4)), Port("gain", "float32", (6,))),
        (Port("logits", "float32", (6, 3)), Port("ids", "int64", (6,))),
        TWO.parameters, TWO.positional, TWO.arguments, TWO.result,
    )  # fmt: skip
    content = model(tmp_path / "m" / "model.onnx", 6)
    bundle = write_bundle(tmp_path / "b", recipes=[ORT], content=content, signature=fixed, inputs=ROWS)
    export_bundle(bundle, "triton", tmp_path / "out")
    config = parsed((tmp_path / "out/b/config.pbtxt").read_text())
    assert config["max_batch_size"] == [0]
    assert [port["dims"] for port in config["input"]] == [[6, 4], [6]]


def test_an_openvino_rung_goes_to_triton_and_ovms(folder: Path, tmp_path: Path) -> None:
    export_bundle(folder, "triton", tmp_path / "t", rung=0)
    assert {p.name for p in (tmp_path / "t/my_digits/1").iterdir()} == {"model.xml", "model.bin"}
    config = parsed((tmp_path / "t/my_digits/config.pbtxt").read_text())
    assert (config["backend"], config["max_batch_size"]) == (["openvino"], [0])
    assert [(p["name"], p["dims"]) for p in config["input"]] == [(["x"], [-1, 4]), (["gain"], [-1])]
    settings = {p["key"][0]: p["value"][0]["string_value"][0] for p in config["parameters"]}
    assert settings == {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}
    export_bundle(folder, "ovms", tmp_path / "o", rung=0)
    config = json.loads((tmp_path / "o/config.json").read_text())
    [entry] = [item["config"] for item in config["model_config_list"]]
    assert (tmp_path / "o" / entry["base_path"] / "1" / "model.xml").exists()
    assert entry["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_the_readme_tells_the_figures_and_what_is_not_carried_over(folder: Path, tmp_path: Path) -> None:
    export_bundle(folder, "triton", tmp_path / "t", rung=1)
    text = (tmp_path / "t/README.md").read_text()
    evidence = Bundle.open(folder).ladder.rungs[1].evidence
    assert f"| times faster than the original | {evidence.speedup.mid:.4g} (" in text
    assert "takes `x`: FP32 (any, 4)" in text
    assert "gives `scores`: FP32 (any, 3), in the bundle `logits: float32 (batch, 3)`" in text
    assert "shapes made fixed for 1 rows" in text
    assert "answers as the rung did" in text
    export_bundle(folder, "ovms", tmp_path / "o", rung=1)
    assert "this server runs the file in OpenVINO" in (tmp_path / "o/README.md").read_text()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_can_not_be_exported_is_refused_with_a_way_out(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"rung 0, openvino.* can't be turned back into ONNX.*give the number .* 1 \("):
        export_bundle(folder, "onnx", tmp_path / "out", rung=0)
    with fakes_known():
        write_bundle(tmp_path / "fakes", recipes=[fake_recipe(0), fake_recipe(1)])
        with pytest.raises(UsageError, match=r"rung 1.*this package only.*no rung of this bundle can"):
            export_bundle(tmp_path / "fakes", "triton", tmp_path / "out")
    with pytest.raises(UsageError, match=r"rung 0, strange.*can't be exported.*no 'strange'"):
        export_bundle(_renamed(tmp_path / "fakes"), "triton", tmp_path / "out", rung=0)
    assert not (tmp_path / "out").exists()


def _renamed(path: Path) -> Bundle:
    """The bundle with a backend that is not known here in place of its first rung's."""
    from dataclasses import replace

    from accelerando.ladder import Ladder
    from accelerando.plugins import stored_recipe

    with fakes_known():
        bundle = Bundle.open(path)
    strange = stored_recipe({"steps": [], "backend": {"name": "strange"}})
    return replace(bundle, ladder=Ladder((replace(bundle.ladder.rungs[0], recipe=strange), *bundle.ladder.rungs[1:])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "tensorrt"}, "no target 'tensorrt'; give one of triton, ovms, onnx"),
        ({"rung": 7}, "no rung 7"),
        ({"rung": True}, "no rung True"),
        ({"rung": "zzz"}, "no rung 'zzz'"),
        ({"name": "../up"}, r"letters.*'\.\./up'"),
        ({"name": ""}, "letters"),
    ],
)
def test_bad_arguments_get_one_clear_error(folder: Path, tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_bundle(folder, **{"to": "onnx", "folder": tmp_path / "out", **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something already"):
        export_bundle(folder, "onnx", tmp_path)
    with pytest.raises(UsageError, match="holds something already"):
        export_bundle(folder, "onnx", tmp_path / "mine.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert export_bundle(folder, "onnx", tmp_path / "empty")


def test_sabotage_a_damaged_rung_is_not_exported(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(folder)
    file = bundle.folder(bundle.ladder.rungs[2]) / "model.onnx"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"\[hash\]"):
            export_bundle(bundle, "triton", tmp_path / "out")
    finally:
        file.write_bytes(whole)
    assert list(tmp_path.iterdir()) == []


def test_sabotage_a_rung_that_answers_otherwise_is_not_exported(tmp_path: Path) -> None:
    """Its stored rows are those of another model, so the copy can't be what was certified."""
    from accelerando.parity import Parity

    content = model(tmp_path / "m" / "model.onnx")
    wrong = tuple(np.zeros_like(x) for x in (np.zeros((6, 3), np.float32), np.zeros(6, np.int64)))
    parity = Parity(tuple(ROWS), wrong, {ORT.key: wrong})
    write_bundle(tmp_path / "b", recipes=[ORT], content=content, signature=TWO, inputs=ROWS, parity=parity)
    with pytest.raises(BundleError, match=r"\[differs\]"):
        export_bundle(tmp_path / "b", "onnx", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "m"]


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("accelerando.model_repository.np.savez", full)
    with pytest.raises(BundleError, match=r"\[no-room\].*nothing is written"):
        export_bundle(folder, "triton", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_stored_rows_is_exported_and_says_so(tmp_path: Path) -> None:
    content = model(tmp_path / "m" / "model.onnx")
    write_bundle(tmp_path / "b", recipes=[ORT], content=content, signature=TWO, inputs=ROWS, parity=None)
    written = export_bundle(tmp_path / "b", "onnx", tmp_path / "out")
    assert [p.name for p in written] == ["README.md", "model.onnx"]
    assert "no stored rows" in (tmp_path / "out/README.md").read_text()
