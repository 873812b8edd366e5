"""How long a single layer takes, in the runtimes that are installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet

ROUNDS, SECONDS = 15, 1.5
OPSET = 20


def fastest(layers: dict[str, Any], x: Any) -> dict[str, tuple[float, str]]:
    """For each of some torch modules that do the same, its least seconds for one input, and the runtime that took them.

    All take turns, `ROUNDS` times or for `SECONDS`, and at least twice.  The least is what the machine can do: whatever
    else it does only adds.

    Raises:
        RefusalError: no runtime takes one of them; in its own words.
    """
    with quiet():
        runs = {(name, tool): run for name, layer in layers.items() for tool, run in _runs(layer, x).items()}
    seconds = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()  # the first call is special
    end, rounds = time.perf_counter() + SECONDS, 0
    while rounds < 2 or (rounds < ROUNDS and time.perf_counter() < end):
        rounds += 1
        for key, run in runs.items():
            run()  # the other runtime's idle threads stop spinning meanwhile
            start = time.perf_counter()
            run()
            seconds[key] = min(seconds[key], time.perf_counter() - start)
    return {name: min((s, tool) for (of, tool), s in seconds.items() if of == name) for name in layers}


def _runs(layer: Any, x: Any) -> dict[str, Callable[[], Any]]:
    """What runs a layer on one input, by the name of the runtime; torch itself where no other is installed."""
    import torch

    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    try:
        import openvino
    except ImportError:
        openvino = None
    if onnxruntime is None and openvino is None:
        return {"torch": lambda: layer(x)}
    try:
        with torch.no_grad():
            program = torch.onnx.export(layer, (x,), dynamo=True, opset_version=OPSET, verbose=False)
        assert program is not None
        content, array, runs = program.model_proto.SerializeToString(), x.numpy(), dict[str, Callable[[], Any]]()
        if onnxruntime is not None:
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: array}
            runs["ONNX Runtime"] = lambda: session.run(None, feed)
        if openvino is not None:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(content, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            runs["OpenVINO"] = lambda: compiled(array)
    except Exception as error:
        raise RefusalError(Reason.UNSUPPORTED, f"{layer} can't be timed: {first_lines(error)}") from error
    return runs
