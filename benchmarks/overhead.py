"""What `fast(x)` costs over the raw ONNX Runtime session's own call.

A model of one small matrix product, so that the call is nearly all there is.  The two take turns call by call, in
ABBA order; the figure is the median of the paired differences with its order-statistic interval.  One thread each,
so that neither session's pool disturbs the other.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.interval import Interval, median_interval
from benchmarks.results import record

CALLS = 20_000
BOUND = 20e-6  # seconds


def measure(calls: int = CALLS, **loading: Any) -> tuple[Interval, Interval]:
    """Seconds that `fast(x)` takes more than `session.run`, and seconds of the latter; `loading` as for `load`."""
    import onnxruntime as ort

    from accelerando import load

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_bundle(Path(folder))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        run = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"]).run
        x = np.ones((1, 64), np.float32)
        with load(Path(folder) / "bundle", **loading) as fast:
            arms = (lambda: fast(x)), (lambda: run(["logits"], {"x": x}))
            assert np.array_equal(arms[0](), arms[1]()[0])
            seconds = np.array([_turn(arms, reverse=bool(i % 2)) for i in range(calls)])
    return median_interval(seconds[:, 0] - seconds[:, 1]), median_interval(seconds[:, 1])


def _turn(arms: tuple[Any, Any], reverse: bool) -> list[float]:
    taken = [0.0, 0.0]
    for which in (1, 0) if reverse else (0, 1):
        start = time.perf_counter()
        arms[which]()
        taken[which] = time.perf_counter() - start
    return taken


def tiny_bundle(folder: Path) -> Path:
    """A bundle of a matrix product, and the path of its .onnx file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from accelerando.backends.onnxruntime import Onnxruntime
    from accelerando.recipe import Recipe
    from accelerando.signature import Port, Signature
    from accelerando.testing.bundles import write_bundle

    weight = np.random.default_rng(0).standard_normal((64, 10), dtype=np.float32)
    ports = ("x", [None, 64]), ("logits", [None, 10])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["logits"])],
        "product",
        *([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", shape[1]])] for name, shape in ports),
        [numpy_helper.from_array(weight, "w")],
    )
    path = folder / "model" / "model.onnx"
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    signature = Signature(
        (Port("x", "float32", ("batch", 64)),), (Port("logits", "float32", ("batch", 10)),),
        ("x",), 1, {"x": {"leaf": 0}}, {"leaf": 0},
    )  # fmt: skip
    rows = np.ones((2, 64), np.float32)
    recipes = [Recipe((), Onnxruntime(threads=1))]
    write_bundle(folder / "bundle", recipes=recipes, content=path, signature=signature, inputs=[rows])
    return path


def run(name: str) -> None:
    more, raw = measure()
    body = (
        f"`fast(x)` takes {more.mid * 1e6:.2f} us ({more.low * 1e6:.2f} to {more.high * 1e6:.2f}) more than "
        f"`session.run`, which takes {raw.mid * 1e6:.2f} us; at most {BOUND * 1e6:.0f} us are asked for: "
        f"{'reached' if more.high <= BOUND else 'not reached'}."
    )
    record(name, "The cost of a call", body)
