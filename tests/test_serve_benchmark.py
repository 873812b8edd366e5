"""The benchmark of the server: how it sends, disturbs and judges."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import bursts, disturbed, overload, serve
from benchmarks.bursts import Replay
from benchmarks.figures import Figure, Found, held_against
from benchmarks.sender import Order, Sent, sent

pytest.importorskip("httptools")
pytest.importorskip("uvloop")


# --- the parts ----------------------------------------------------------------------------------------------------


def test_a_part_that_fails_says_so_in_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(ground: Any) -> Found:
        raise OSError("no port is free")

    found = serve.outcome("overload", broken, None)  # type: ignore[arg-type]
    assert not found.figures[0].reached
    assert "overload failed: no port is free" in found.text
    assert "OSError" in capsys.readouterr().err


def test_a_figure_that_was_not_reached_stands_out() -> None:
    said = held_against([Figure("p50", "0.5 ms", "0.6 ms", True), Figure("p99", "9 ms", "1.2 ms", False)]).splitlines()
    assert said[-2].endswith("| reached |")
    assert said[-1].endswith("| **not reached** |")


# --- sending ------------------------------------------------------------------------------------------------------

TOGETHER = 6


class Waiting(BaseHTTPRequestHandler):
    """Answers nobody until all are there: who waits for an answer before it sends the next request waits for ever."""

    protocol_version = "HTTP/1.1"
    all_there: threading.Barrier
    bodies: list[bytes]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.all_there.wait(60)
        answer = b'{"parameters": {"rung": 3}}'
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def waiting() -> Iterator[ThreadingHTTPServer]:
    Waiting.all_there, Waiting.bodies = threading.Barrier(TOGETHER), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Waiting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_requests_go_out_at_their_times_whatever_became_of_those_before(waiting: ThreadingHTTPServer) -> None:
    rows = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    arrivals = 0.01 * np.arange(TOGETHER)
    found = sent(Order(waiting.server_address[1], "/v2/models/m/infer", "x", TOGETHER), rows, arrivals)
    assert found.good.all()
    assert found.rung.tolist() == [3] * TOGETHER
    np.testing.assert_allclose(found.planned - found.planned[0], arrivals, atol=1e-6)
    assert (found.went >= found.planned - 1e-3).all()
    assert found.came.min() >= found.went.max()  # no answer came before the last request went out
    assert {body[-32:] for body in Waiting.bodies} == {some.tobytes() for some in rows}


# --- judging ------------------------------------------------------------------------------------------------------


class Held:
    most = 100

    def __init__(self, more: float = 0.0) -> None:
        self.more = more

    def usual(self, start: float, end: float) -> float:
        return 100 + self.more * (start - 50.0)


def after(seconds: np.ndarray, status: np.ndarray) -> Sent:
    planned = 50.0 + np.arange(len(seconds)) / 10
    return Sent(planned, planned, planned + seconds, status, np.where(status == 200, 1, -1))


def test_sabotage_an_answer_that_is_late_or_refused_is_no_goodput() -> None:
    seconds, status = np.full(200, 0.1), np.full(200, 200)
    whole = overload.told(after(seconds, status), 100, 10.0, 10.0, 5.0, Held())  # type: ignore[arg-type]
    assert all(f.reached for f in whole.figures)
    seconds[:11] = 0.4
    late = overload.told(after(seconds, status), 100, 10.0, 10.0, 5.0, Held())  # type: ignore[arg-type]
    assert [f.reached for f in late.figures] == [False, True, True]
    status[20:40] = 503
    refused = overload.told(after(np.full(200, 0.1), status), 100, 10.0, 10.0, 5.0, Held())  # type: ignore[arg-type]
    assert [f.reached for f in refused.figures] == [False, True, True]


def test_sabotage_a_miss_long_after_the_overload_is_seen() -> None:
    seconds = np.full(200, 0.1)
    seconds[120] = 0.9
    found = overload.told(after(seconds, np.full(200, 200)), 100, 10.0, 10.0, 5.0, Held())  # type: ignore[arg-type]
    assert [f.reached for f in found.figures] == [True, True, False]


def test_sabotage_memory_that_grows_all_the_while_is_seen() -> None:
    calm = after(np.full(200, 0.1), np.full(200, 200))
    found = overload.told(calm, 100, 10.0, 10.0, 5.0, Held(more=3.0))  # type: ignore[arg-type]
    assert [f.reached for f in found.figures] == [True, False, True]


def fared(met: float, effective: float, policy: str = "one") -> Replay:
    return Replay(policy, met, effective / met, effective, 0.0, 0.1)


def test_the_governor_is_held_against_whoever_meets_as_many_deadlines() -> None:
    fixed, others = [fared(0.9, 0.97), fared(1.0, 0.94)], [fared(0.8, 0.7)]
    assert [f.reached for f in bursts.figures(fared(0.9995, 0.96), fixed, others, 4.0)] == [True, True]
    assert [f.reached for f in bursts.figures(fared(0.9995, 0.93), fixed, others, 4.0)] == [True, False]
    assert [f.reached for f in bursts.figures(fared(0.89, 0.96), fixed, others, 23.0)] == [False, False]
    assert [f.reached for f in bursts.figures(fared(0.9995, 0.96), fixed, [fared(0.98, 0.965)], 4.0)] == [True, False]


# --- disturbing ---------------------------------------------------------------------------------------------------


def test_noise_changes_matrices_and_nothing_else(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).integers(-90, 90, (16, 10)).astype(np.int8)
    bias = np.ones(10, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"]), helper.make_node("Identity", ["b"], ["z"])],
        "weights", [],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [16, 10]),
         helper.make_tensor_value_info("z", TensorProto.FLOAT, [10])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    content = helper.make_model(graph).SerializeToString()
    assert disturbed.noisy(content, 0.0) == content
    noisy = disturbed.noisy(content, 0.5)
    assert noisy == disturbed.noisy(content, 0.5)
    assert len(noisy) == len(content)
    found = [numpy_helper.to_array(t) for t in onnx.load_from_string(noisy).graph.initializer]
    assert 0 < np.abs(found[0].astype(int) - weight).mean() < np.abs(weight.astype(int)).mean()
    assert np.array_equal(found[1], bias)
