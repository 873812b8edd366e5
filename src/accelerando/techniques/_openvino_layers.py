"""The layers of a model that NNCF has quantized, each of which can be switched back to float."""

from __future__ import annotations

from typing import Any

from accelerando.signature import Array, Signature
from accelerando.techniques._calibration import feeds
from accelerando.techniques._sensitivity import Answers
from accelerando.workload import Samples

HEAVY = (
    "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul",
    "ScaledDotProductAttention", "LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell",
)  # fmt: skip
# Between a quantizer and its layer: they move numbers about without changing them.
MOVES = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Concat", "MaxPool", "Pad", "Slice",
    "StridedSlice", "Gather", "Convert", "Relu", "ShuffleChannels", "DepthToSpace", "SpaceToDepth", "Tile", "Broadcast",
)  # fmt: skip
FAKE = "FakeQuantize"


class Switchboard:
    """A quantized model in which every FakeQuantize has a switch: on, or past it.

    All layers are measured with one compilation: compiling a model for each would take minutes.

    Args:
        quantized: an OpenVINO model with FakeQuantize on weights and activations; it is rebuilt in place.
    """

    def __init__(self, quantized: Any) -> None:
        import openvino
        from openvino import opset13 as ops

        self.layers = {n.get_friendly_name(): quantizers_of(n) for n in heavy(quantized)}
        self.layers = {name: found for name, found in self.layers.items() if found}
        switches = []
        self.numbers: dict[str, int] = {}
        for number, fake in enumerate(o for o in quantized.get_ordered_ops() if o.get_type_name() == FAKE):
            switch = ops.parameter([], openvino.Type.boolean)
            switch.output(0).get_tensor().set_names({f"accelerando_switch_{number}"})
            targets = list(fake.output(0).get_target_inputs())
            chosen = ops.select(switch, fake.output(0), fake.input_value(0))
            for target in targets:
                target.replace_source_output(chosen.output(0))
            self.numbers[fake.get_friendly_name()] = number
            switches.append(switch)
        quantized.add_parameters(switches)
        # In float32: it is the quantizers' error that is measured, not that of a processor's favourite precision.
        config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self.compiled = openvino.Core().compile_model(quantized, "CPU", config)

    def answers(self, rows: Samples, signature: Signature, only: str | None = None) -> Answers:
        """The outputs with one layer quantized, or none, batch by batch."""
        on = {self.numbers[fake] for fake in self.layers.get(only or "", ())}
        switches = {f"accelerando_switch_{n}": n in on for n in self.numbers.values()}
        return [_answer(self.compiled, {**feed, **switches}) for feed in feeds(rows, signature)]


def heavy(model: Any) -> list[Any]:
    """The operators that do nearly all of the arithmetic, in topological order."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in HEAVY]


def quantizers_of(layer: Any) -> tuple[str, ...]:
    """Names of the quantizers on a layer's inputs, found upwards through what only moves numbers."""
    found, ahead = dict[str, None](), [v.get_node() for v in layer.input_values()]
    while ahead:
        node = ahead.pop()
        if node.get_type_name() == FAKE:
            found[node.get_friendly_name()] = None
        elif node.get_type_name() in MOVES:
            ahead += [v.get_node() for v in node.input_values()]
    return tuple(found)


def _answer(compiled: Any, feed: dict[str, Any]) -> list[Array]:
    import numpy as np

    answers = compiled({name: np.asarray(value) for name, value in feed.items()})
    return [np.array(answers[port]) for port in compiled.outputs]
