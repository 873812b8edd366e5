"""What this machine reaches at best, measured: products in float32 and int8, and moving bytes.

The figures of STREAM (McCalpin 1995) and of a large matrix product are the two roofs of the roofline (Williams,
Waterman & Patterson, *Communications of the ACM* 52, 2009).  Every route that is installed is tried, and the
fastest is the ceiling: a ceiling that some library passes would not be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.errors import MissingExtraError
from accelerando.interval import Floats, Interval, median_interval
from accelerando.machine import Machine
from accelerando.profile.layers import call_seconds

Route = tuple[str, float, Callable[[], Any]]  # its name, the operations or bytes of one call, and the call

ROUNDS = 2  # at two times, so that another program in the way at one of them does not lower a roof
LEAST_REPEATS = 3  # in each round
SIZES = (768, 512, 256)  # of a square product: the largest that leaves time for the repeats
LARGE = 512 * 2**20  # bytes for the memory's own speed, at most
SMALL = 2**20  # bytes for the cache's, where the size of the second level is not known

WHATS = {
    "float32": "products in float32",
    "int8": "products in int8",
    "memory": "bytes from memory",
    "cache": "bytes from the cache",
    "call": "starts of a small torch module",
    "node": "starts of a small ONNX node",
}


@dataclass(frozen=True)
class Ceiling:
    """One roof, in operations (2 per multiplication with addition), bytes or starts per second.

    `rate` is the median over repeats; `best` the fastest repeat, which is the roof: other programs on the machine only
    ever slow it.  `by` names the route that was fastest.
    """

    what: str
    threads: int
    rate: Interval
    best: float
    by: str

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rate": self.rate.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ceiling:
        return cls(**{**data, "rate": Interval.from_json(data["rate"])})


@dataclass(frozen=True)
class Ceilings:
    """The roofs for one thread and for all cores."""

    entries: tuple[Ceiling, ...]

    @classmethod
    def measure(cls, machine: Machine, seconds: float = 5.0) -> Ceilings:
        """Measure them all in about this many seconds; torch's number of threads is put back afterwards.

        Raises:
            MissingExtraError: torch is not installed.
        """
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("profiling needs torch: pip install 'accelerando[optimize]'") from error
        threads = sorted({1, machine.cores})
        plans = [(count, what) for count in threads for what in WHATS]
        rates: dict[tuple[int, str], dict[str, list[Floats]]] = {plan: {} for plan in plans}
        for count, what in plans * ROUNDS:
            with _threads(count):
                for by, found in _rates(what, count, machine, seconds / len(plans) / ROUNDS):
                    rates[count, what].setdefault(by, []).append(found)
        fastest = {plan: _fastest(routes) for plan, routes in rates.items() if routes}
        return cls(tuple(Ceiling(what, count, *ceiling) for (count, what), ceiling in fastest.items()))

    def of(self, what: str, threads: int) -> Ceiling | None:
        """The roof measured with the number of threads that is nearest; None where this machine has no route."""
        there = [c for c in self.entries if c.what == what]
        return min(there, key=lambda c: abs(c.threads - threads)) if there else None

    def roof(self, what: str, threads: int) -> float:
        """The highest rate with at most so many threads, per second.

        Where there is none for int8 it is float32's, for then int8 is computed in float32.

        Raises:
            ValueError: it was never measured.
        """
        there = [c.best for c in self.entries if c.what == what and c.threads <= max(threads, 1)]
        if not there and what == "int8":
            return self.roof("float32", threads)
        if not there:
            raise ValueError(f"there is no ceiling for {what!r}; there are {sorted({c.what for c in self.entries})}")
        return max(there)

    def to_json(self) -> list[dict[str, Any]]:
        return [c.to_json() for c in self.entries]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> Ceilings:
        return cls(tuple(Ceiling.from_json(c) for c in data))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rates(what: str, threads: int, machine: Machine, seconds: float) -> Iterator[tuple[str, Floats]]:
    """Each route to one roof, with the rate of every repeat."""
    plans: dict[str, Callable[[], Iterator[Route]]] = {
        "float32": lambda: _products("float32", threads, seconds),
        "int8": lambda: _products("int8", threads, seconds),
        "memory": lambda: _moves(min(LARGE, max(4 * _last_cache(machine), 64 * 2**20), machine.memory_bytes // 8)),
        "cache": lambda: _moves(dict(machine.caches).get("L2", SMALL) * threads // 2),
        "call": _starts,
        "node": lambda: _node_starts(threads),
    }
    for by, amount, run in plans[what]():
        yield by, amount / call_seconds(run, seconds / 3, LEAST_REPEATS)


def _fastest(routes: dict[str, list[Floats]]) -> tuple[Interval, float, str]:
    """The route whose best repeat is the fastest: its median with the interval, that repeat, and its name."""
    rates = {by: np.concatenate(found) for by, found in routes.items()}
    by = max(rates, key=lambda name: float(rates[name].max()))
    return median_interval(rates[by]), float(rates[by].max()), by


def _last_cache(machine: Machine) -> int:
    return max((size for _, size in machine.caches), default=32 * 2**20)


def _products(kind: str, threads: int, seconds: float) -> Iterator[Route]:
    """Square products: name, operations, and the call."""
    for by, make in (("torch", _torch_product), ("ONNX Runtime", _onnx_product)):
        try:
            probe = float(np.median(call_seconds(make(kind, 128, threads), 0.0)))
        except (ImportError, RuntimeError, NotImplementedError):
            continue  # this library has no such product on this machine
        fits = [n for n in SIZES if probe * (n / 128) ** 3 * LEAST_REPEATS < seconds / 2]
        size = fits[0] if fits else 128
        yield by, 2.0 * size**3, make(kind, size, threads)


def _torch_product(kind: str, size: int, threads: int) -> Callable[[], Any]:
    import torch

    if kind == "int8":
        whole = torch.randint(-10, 10, (size, size), dtype=torch.int8)
        return lambda: torch._int_mm(whole, whole)
    a, out = torch.rand(size, size), torch.empty(size, size)
    return lambda: torch.mm(a, a, out=out)


def _onnx_product(kind: str, size: int, threads: int) -> Callable[[], Any]:
    """A product with constant weights, uint8 by int8 as in quantized models, in a session of its own."""
    import onnx

    types = onnx.TensorProto
    left, right, result, operator = (
        (types.UINT8, np.int8, types.INT32, "MatMulInteger")
        if kind == "int8"
        else (types.FLOAT, np.float32, types.FLOAT, "MatMul")
    )
    rng = np.random.default_rng(0)
    weights = onnx.numpy_helper.from_array(rng.integers(-10, 10, (size, size)).astype(right), "w")
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node(operator, ["x", "w"], ["y"])],
        "product",
        [make.make_tensor_value_info("x", left, [size, size])],
        [make.make_tensor_value_info("y", result, [size, size])],
        [weights],
    )
    session = _session(graph, threads)
    x = rng.integers(0, 10, (size, size)).astype(np.uint8 if kind == "int8" else np.float32)
    return lambda: session.run(None, {"x": x})


def _session(graph: Any, threads: int) -> Any:
    import onnx
    import onnxruntime

    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _moves(size: int) -> Iterator[Route]:
    """Copy, triad and sum over `size` bytes in all, repeated where that is little: name, bytes, call."""
    import torch

    half = max(size // 8, 1024)
    a, b = torch.zeros(half), torch.ones(half)
    repeats = max(1, 4 * 2**20 // size)

    def repeated(run: Callable[[], Any]) -> Callable[[], Any]:
        def all_of_them() -> None:
            for _ in range(repeats):
                run()

        return all_of_them

    yield "copy", 8.0 * half * repeats, repeated(lambda: a.copy_(b))
    yield "triad", 12.0 * half * repeats, repeated(lambda: torch.add(a, b, alpha=0.5, out=a))
    yield "sum", 8.0 * half * repeats, repeated(lambda: (a.sum(), b.sum()))


def _starts() -> Iterator[Route]:
    """What it costs to start an operation that has nothing to do: a linear layer of one number."""
    import torch

    layer, x = torch.nn.Linear(1, 1).eval(), torch.zeros(1, 1)

    def run() -> None:
        with torch.no_grad():
            for _ in range(100):
                layer(x)

    yield "torch", 100.0, run


def _node_starts(threads: int) -> Iterator[Route]:
    """The same for ONNX Runtime: a chain of nodes on one number, none of which can be fused or left out."""
    try:
        import onnx
    except ImportError:
        return
    make, count = onnx.helper, 64
    value = onnx.TensorProto.FLOAT
    nodes = [make.make_node(("Sin", "Cos")[i % 2], [f"v{i}"], [f"v{i + 1}"]) for i in range(count)]
    ends = [make.make_tensor_value_info(name, value, [1]) for name in ("v0", f"v{count}")]
    session = _session(make.make_graph(nodes, "chain", ends[:1], ends[1:]), threads)
    x = np.zeros(1, dtype=np.float32)
    yield "ONNX Runtime", float(count), lambda: session.run(None, {"v0": x})
