"""The layers of an ONNX model: the nodes that ONNX Runtime really runs, timed by its own profiler.

The runtime fuses nodes before it runs them, so the graph that is read and timed is the optimized one; it lies in a
temporary folder, together with the profiles, for as long as it is needed.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.errors import MissingExtraError, ModelError
from accelerando.interval import median_interval
from accelerando.profile.layers import (
    LEAST_RUNS,
    Layer,
    Look,
    call_seconds,
    covered_share,
    disturbance,
    layer_medians,
    rows_of,
)
from accelerando.profile.products import FAMILIES, GATHERS, INT8, VIEWS, node_flops
from accelerando.workload import Model, Samples

Shape = tuple[int, ...]
EVENTS = 10_000  # in one profile: each is a kilobyte of JSON
SUFFIX = "_kernel_time"
MICRO = 1e-6  # the profile counts microseconds
WIDTHS = {
    "float": 4,
    "double": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
    "bool": 1,
}


class Nodes:
    """A model in the form ONNX, run by ONNX Runtime with its default settings."""

    def __init__(self, model: Model, samples: Samples) -> None:
        self.path, self.samples = Path(model.content), samples
        try:
            import onnx  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "an ONNX model's profile needs onnx: pip install 'accelerando[optimize]'"
            ) from error

    def call(self, batch: int) -> Callable[[], Any]:
        return self._run(self._plain, batch)

    def peak_bytes(self, batch: int) -> int:
        return max(self._trace(batch, runs=0).live_bytes(0).values(), default=0)

    def look(self, batch: int, seconds: float) -> Look:
        whole = call_seconds(self.call(batch), 0.5 * seconds)
        affordable = min(0.3 * seconds / float(np.median(whole)), EVENTS / max(len(self._graph.nodes), 1))
        trace = self._trace(batch, max(LEAST_RUNS, round(affordable)))
        by_layer = np.array([trace.seconds(i) for i in range(len(trace.runs))])[1:]
        total = np.array([run.took for run in trace.runs])[1:]
        peaks = trace.live_bytes(0)
        layers = [
            trace.layer(node, interval, peaks)
            for node, interval in zip(self._graph.nodes, layer_medians(by_layer), strict=True)
        ]
        notes = [
            f"node {n.name!r} ({n.operator}) holds a graph of its own: its FLOPs are not counted"
            for n in self._graph.nodes
            if n.nested
        ]
        plain, timed = median_interval(whole), median_interval(total)
        notes += disturbance(timed, plain, len(layers))
        return Look(
            tuple(layer for layer in layers if layer.calls), plain, timed, covered_share(by_layer, total),
            _threads(), sum(self._graph.weights.values()), max(peaks.values(), default=0), tuple(notes),
        )  # fmt: skip

    @cached_property
    def _plain(self) -> Any:
        return _session(self.path)

    @cached_property
    def _optimized(self) -> Path:
        """The graph that the runtime makes of the model, every node with a name of its own."""
        import onnx

        folder = Path(tempfile.mkdtemp(prefix="accelerando-profile-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = folder / "optimized.onnx"
        # Weights lie beside the graph, for a file of its own may not pass 2 GiB.
        prefix = "session.optimized_model_external_initializers_"
        _session(
            self.path,
            optimized_model_filepath=str(path),
            entries={f"{prefix}file_name": "optimized.weights", f"{prefix}min_size_in_bytes": "1024"},
        )
        model, taken = onnx.load(path, load_external_data=False), set[str]()
        for i, node in enumerate(model.graph.node):
            if not node.name or node.name in taken:
                node.name = f"{node.op_type}_{i}"
            taken.add(node.name)
        onnx.save(model, path)
        return path

    @cached_property
    def _graph(self) -> _Graph:
        return _Graph.read(self._optimized)

    def _trace(self, batch: int, runs: int) -> _Trace:
        """The trace of this many calls and one before them."""
        import onnxruntime

        session = _session(
            self._optimized,
            enable_profiling=True,
            profile_file_prefix=str(self._optimized.parent / "profile"),
            graph_optimization_level=onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        )
        call = self._run(session, batch)
        for _ in range(runs + 1):
            call()
        file = Path(session.end_profiling())
        events = json.loads(file.read_text())
        file.unlink()
        feed = dict(zip((i.name for i in session.get_inputs()), rows_of(self.samples, batch), strict=True))
        return _Trace.read(self._graph, events, feed)

    def _run(self, session: Any, batch: int) -> Callable[[], Any]:
        names = [i.name for i in session.get_inputs()]
        feed = dict(zip(names, rows_of(self.samples, batch), strict=True))
        return lambda: session.run(None, feed)


def _session(path: Path, entries: Mapping[str, str] | None = None, **settings: Any) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the optimized file is for this machine only: so it is meant
    for name, value in settings.items():
        setattr(options, name, value)
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class _Node:
    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    nested: bool


@dataclass(frozen=True)
class _Graph:
    """The optimized graph: nodes in order, and the shapes and bytes of its weights."""

    nodes: tuple[_Node, ...]
    outputs: frozenset[str]
    shapes: dict[str, Shape]
    weights: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> _Graph:
        import onnx

        graph = onnx.load(path, load_external_data=False).graph
        shapes, weights = {}, {}
        for tensor in graph.initializer:
            shapes[tensor.name] = tuple(tensor.dims)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            weights[tensor.name] = math.prod(tensor.dims) * dtype.itemsize
        nodes = []
        for node in graph.node:
            kinds = {a.type for a in node.attribute}
            plain = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute if a.type in (1, 2, 3, 6, 7)}
            nested = bool(kinds & {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})
            nodes.append(_Node(node.name, node.op_type, tuple(node.input), tuple(node.output), plain, nested))
        return cls(tuple(nodes), frozenset(o.name for o in graph.output), shapes, weights)


@dataclass(frozen=True)
class _Run:
    """One call in the profile: seconds in all, and of each node its seconds and the shapes and bytes it gave."""

    took: float
    seconds: dict[str, float]
    shapes: dict[str, Shape]
    sizes: dict[str, int]


@dataclass(frozen=True)
class _Trace:
    graph: _Graph
    runs: tuple[_Run, ...]

    @classmethod
    def read(cls, graph: _Graph, events: list[dict[str, Any]], feed: Mapping[str, Any]) -> _Trace:
        """Sort the profile's events into runs.

        Raises:
            ModelError: the profile holds no run.
        """
        by_name = {node.name: node for node in graph.nodes}
        kernels = sorted(
            (e for e in events if e.get("cat") == "Node" and e["name"].endswith(SUFFIX)), key=lambda e: e["ts"]
        )
        starts = [e["ts"] for e in kernels]
        runs = []
        for whole in sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"]):
            run = _Run(whole["dur"] * MICRO, {}, dict(graph.shapes), dict(graph.weights))
            for name, array in feed.items():
                run.shapes[name], run.sizes[name] = array.shape, array.nbytes
            mine = slice(bisect_left(starts, whole["ts"]), bisect_right(starts, whole["ts"] + whole["dur"]))
            for event in kernels[mine]:
                node = by_name.get(event["name"][: -len(SUFFIX)])
                if node is None:
                    continue  # inside a nested graph: its time is part of the node that holds it
                run.seconds[node.name] = run.seconds.get(node.name, 0.0) + event["dur"] * MICRO
                given = event["args"].get("output_type_shape", [])
                for output, typed in zip([o for o in node.outputs if o], given, strict=False):
                    (kind, shape), *_ = typed.items()
                    run.shapes[output] = tuple(shape)
                    run.sizes[output] = math.prod(shape) * WIDTHS.get(kind, 4)
            runs.append(run)
        if not runs:
            raise ModelError("ONNX Runtime wrote a profile without a run; the model can't be profiled by its nodes")
        return cls(graph, tuple(runs))

    def seconds(self, run: int) -> list[float]:
        return [self.runs[run].seconds.get(node.name, 0.0) for node in self.graph.nodes]

    def live_bytes(self, run: int) -> dict[str, int]:
        """Bytes of activations alive while each node runs: from where they are made to their last reader."""
        sizes = self.runs[run].sizes
        last = {name: i for i, node in enumerate(self.graph.nodes) for name in node.inputs}
        last |= dict.fromkeys(self.graph.outputs, len(self.graph.nodes))
        made = {o for node in self.graph.nodes for o in node.outputs}
        alive: dict[str, int] = {}
        found = {}
        for i, node in enumerate(self.graph.nodes):
            if node.operator not in VIEWS:  # a view lives in the array that it shows
                alive |= {o: sizes.get(o, 0) for o in node.outputs if o}
            found[node.name] = sum(size for name, size in alive.items() if name in made)
            alive = {name: size for name, size in alive.items() if last.get(name, -1) > i}
        return found

    def layer(self, node: _Node, seconds: Any, live: Mapping[str, int]) -> Layer:
        run = self.runs[0]
        inputs, outputs = [i for i in node.inputs if i], [o for o in node.outputs if o]
        weights = {i: self.graph.weights[i] for i in inputs if i in self.graph.weights}
        made = sum(run.sizes.get(o, 0) for o in outputs)
        activations = made + sum(run.sizes.get(i, 0) for i in inputs if i not in weights)
        reads = sum(weights.values())
        if node.operator in VIEWS:
            activations = reads = 0
        elif node.operator in GATHERS and weights:
            reads = min(reads, made)  # it reads the rows that it looks up
        shapes = [run.shapes.get(i) if i else None for i in node.inputs]
        kernel = shapes[1][2:] if "Conv" in node.operator and len(shapes) > 1 and shapes[1] else ()
        return Layer(
            name=node.name,
            kind=node.operator,
            family=FAMILIES.get(node.operator, "view" if node.operator in VIEWS else "pointwise"),
            precision="int8" if node.operator in INT8 else "float32",
            calls=int(node.name in run.seconds),
            operations=int(node.operator not in VIEWS),
            seconds=seconds,
            flops=node_flops(node.operator, shapes, [run.shapes.get(o) for o in outputs], node.attributes),
            weight_bytes=sum(weights.values()),
            activation_bytes=activations,
            moved_bytes=activations + reads,
            peak_bytes=made if node.operator not in VIEWS else 0,
            kernel=math.prod(kernel) if kernel else 0,
        )


def _threads() -> int:
    """How many threads a session takes by default: one per core that this process may use."""
    from accelerando.machine import Machine

    return Machine.look().cores
