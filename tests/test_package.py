"""What `import accelerando` gives, and what it must not bring along."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import accelerando

HEAVY = ("torch", "onnx", "openvino", "nncf", "onnxscript", "transformers", "sklearn", "pandas", "plotly")
SEARCH = tuple(f"accelerando.{trade}" for trade in ("search", "techniques", "measure", "train", "profile", "report"))

LINEAR = """
import onnx
from onnx import TensorProto, helper
w = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [float(i) for i in range(12)])
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["logits"])], "linear",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
    [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])], [w],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), "m/model.onnx")
from pathlib import Path
from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.plugins import find
from accelerando.recipe import Recipe
from accelerando.testing.bundles import write_bundle
step = find("techniques", "export_onnx")()
recipes = [Recipe((), Onnxruntime()), Recipe((step,), Onnxruntime(threads=1))]
write_bundle(Path("b"), recipes=recipes, content=Path("m/model.onnx"))
"""


def fresh(code: str, folder: Path) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", accelerando.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(accelerando, name) is not None
    assert name in dir(accelerando)


def test_the_list_of_names_is_whole() -> None:
    assert sorted(accelerando.__all__, key=str.casefold) == sorted(set(accelerando.__all__), key=str.casefold)
    assert set(accelerando._HOMES) == set(accelerando.__all__) - {"__version__"}
    assert accelerando.__version__ == metadata.version("accelerando")


def test_a_name_that_is_not_there_is_answered_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"accelerando has no 'optimise'; it has .*accelerate"):
        accelerando.optimise  # noqa: B018


def test_importing_it_imports_nothing_else(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import accelerando\n"
        "print(*sorted(m for m in set(sys.modules) - before if m.startswith(('accelerando', 'numpy'))))"
    )
    assert fresh(code, tmp_path) == "accelerando"


def test_loading_a_bundle_brings_neither_torch_nor_the_search(tmp_path: Path) -> None:
    """By the door that people use: a plain import in a fresh process, and an answer."""
    (tmp_path / "m").mkdir()
    fresh(LINEAR, tmp_path)
    code = (
        "import sys, accelerando, numpy as np\n"
        "fast = accelerando.load('b')\n"
        "assert fast(np.ones((2, 4), np.float32)).shape == (2, 3)\n"
        "assert 'export_onnx' in str(fast.recipe), fast\n"
        f"print(*sorted(m for m in {(*HEAVY, *SEARCH)!r} if m in sys.modules))"
    )
    assert fresh(code, tmp_path) == ""
