from __future__ import annotations

import asyncio
import gzip
import json
import logging
import tracemalloc
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from caller import Caller, Got, call, run
from shelf import DOUBLE, SIMPLE, FakeServed, FakeShelf, double, signature_of, sum_and_difference

from accelerando.errors import BundleError, ClosedError, DeadlineError, MissingExtraError, OverloadedError
from accelerando.server.access import Settings
from accelerando.server.rest import Rest
from accelerando.server.tensors import to_raw

A, B = np.arange(16, dtype=np.int32).reshape(1, 16), np.ones((1, 16), np.int32)
INFER = "/v2/models/simple/infer"


def tensor(name: str, array: np.ndarray, datatype: str = "INT32", **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [*array.shape], "data": array.ravel().tolist(), **more}


def request(**changed: Any) -> dict[str, Any]:
    """A good request to `simple`; None takes a field out."""
    fields = {"inputs": [tensor("INPUT0", A), tensor("INPUT1", B)], **changed}
    return {key: value for key, value in fields.items() if value is not None}


def packed(arrays: Mapping[str, np.ndarray], datatype: str = "INT32", **more: Any) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a request whose tensors follow the JSON."""
    inputs = []
    for name, array in arrays.items():
        size = {"binary_data_size": len(to_raw(array))}
        inputs.append({"name": name, "datatype": datatype, "shape": [*array.shape], "parameters": size})
    head = json.dumps({"inputs": inputs, **more}).encode()
    return head + b"".join(map(to_raw, arrays.values())), {"Inference-Header-Content-Length": str(len(head))}


def outputs(got: Got) -> dict[str, Any]:
    """The tensors of an answer by name, from JSON or from the bytes after it."""
    assert got.status == 200, got.body
    length = got.headers.get("inference-header-content-length")
    head = json.loads(got.body if length is None else got.body[: int(length)])
    at, found = 0 if length is None else int(length), {}
    for item in head["outputs"]:
        dtype = {"INT32": np.int32, "FP32": np.float32, "FP16": np.float16}[item["datatype"]]
        if "data" in item:
            flat = np.array(item["data"], dtype)
        else:
            size = item["parameters"]["binary_data_size"]
            flat = np.frombuffer(got.body[at : at + size], dtype)
            at += size
        found[item["name"]] = flat.reshape(item["shape"])
    assert at in (0, len(got.body))
    return found


@pytest.fixture
def served() -> FakeServed:
    return FakeServed()


@pytest.fixture
def shelf(served: FakeServed) -> FakeShelf:
    return FakeShelf({"simple": served, "double": FakeServed(DOUBLE, double)}, out={"away": FakeServed()})


@pytest.fixture
def app(shelf: FakeShelf) -> Rest:
    return Rest(shelf)


def infer(app: Rest, body: Any, path: str = INFER, **headers: str) -> Got:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(app, "POST", path, data, {k.replace("_", "-"): v for k, v in headers.items()})


# --- what the protocol tells ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "part"),
    [
        ("/v2", 200, {"name": "accelerando"}),
        ("/v2/", 200, {"name": "accelerando"}),
        ("/v2/health/live", 200, {"live": True}),
        ("/v2/health/ready", 200, {"ready": True}),
        ("/v2/models/simple", 200, {"name": "simple", "versions": ["1"], "platform": "accelerando"}),
        ("/v2/models/simple/versions/1", 200, {"name": "simple"}),
        ("/v2/models/simple/ready", 200, {"name": "simple", "ready": True}),
        ("/v2/models/simple/versions/1/ready", 200, {"name": "simple", "ready": True}),
        ("/v2/models/away/ready", 503, {"name": "away", "ready": False}),
        ("/v2/models/away", 503, {}),
        ("/v2/models/nope", 404, {}),
        ("/v2/models/nope/ready", 404, {}),
        ("/v2/models/simple/versions/7", 404, {}),
        ("/v2/models/simple/versions/7/ready", 404, {}),
        ("/v2/models/simple/versions/x", 404, {}),
        ("/v2/models/simple/goal", 200, {"goal": "p99 <= 20ms"}),
        ("/v2/models", 404, {}),
        ("/v2/models/", 404, {}),
        ("/v2/models//infer", 404, {}),
        ("/v2/models/simple/nope", 404, {}),
        ("/v2/models/simple/ready/more", 404, {}),
        ("/v2/nope", 404, {}),
        ("/v3", 404, {}),
        ("/", 404, {}),
        ("", 404, {}),
        ("/metrics", 404, {}),
        ("/docs/more", 404, {}),
        ("/v1/models/simple", 404, {}),
        ("/v2/trace/setting", 501, {}),
        ("/v2/systemsharedmemory/status", 501, {}),
    ],
)
def test_each_path_answers_by_the_protocol(app: Rest, path: str, status: int, part: dict[str, Any]) -> None:
    got = call(app, "GET", path)
    assert got.status == status
    assert got.headers["content-type"] == "application/json"
    assert part.items() <= got.json.items()
    if status >= 400:
        assert got.error
    head = call(app, "HEAD", path)
    assert (head.status, head.headers, head.body) == (got.status, got.headers, b"")


def test_the_server_tells_its_extensions_and_the_name_that_it_was_given(shelf: FakeShelf) -> None:
    told = call(Rest(shelf, Settings(server_name="triton")), "GET", "/v2").json
    assert told["name"] == "triton"
    assert {"binary_tensor_data", "model_repository", "statistics", "schedule_policy"} <= set(told["extensions"])


def test_a_model_without_a_rung_that_can_run_is_not_ready(served: FakeServed) -> None:
    app, served.ready = Rest(FakeShelf({"simple": served})), False
    got = call(app, "GET", "/v2/models/simple/ready")
    assert (got.status, got.json) == (503, {"name": "simple", "ready": False, "error": "none of its rungs can run"})
    assert call(app, "GET", "/v2/models/simple").status == 200


def test_a_server_that_is_not_ready_says_so_and_lives(served: FakeServed) -> None:
    app = Rest(FakeShelf({"simple": served}, ready=False))
    assert call(app, "GET", "/v2/health/ready").status == 503
    assert call(app, "GET", "/v2/health/live").status == 200


def test_metadata_and_config_tell_the_tensors(app: Rest) -> None:
    told = call(app, "GET", "/v2/models/simple").json
    assert told["inputs"] == [
        {"name": "INPUT0", "datatype": "INT32", "shape": [-1, 16]},
        {"name": "INPUT1", "datatype": "INT32", "shape": [-1, 16]},
    ]
    assert [output["name"] for output in told["outputs"]] == ["OUTPUT0", "OUTPUT1"]
    config = call(app, "GET", "/v2/models/simple/config").json
    assert config["max_batch_size"] == Settings().max_rows
    assert config["input"][0] == {"name": "INPUT0", "data_type": "TYPE_INT32", "dims": [16], "optional": False}


def test_a_fixed_batch_is_part_of_the_dims() -> None:
    fixed = signature_of({"x": ("float32", (2, 4))}, {"y": ("float32", (2, 4))})
    config = call(Rest(FakeShelf({"m": FakeServed(fixed, double)})), "GET", "/v2/models/m/config").json
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [2, 4]


def test_statistics_count_in_the_shape_that_triton_s_clients_read(app: Rest, served: FakeServed) -> None:
    for _ in range(3):
        assert infer(app, request()).status == 200
    (told,) = call(app, "GET", "/v2/models/simple/stats").json["model_stats"]
    assert (told["name"], told["version"]) == ("simple", "1")
    assert (told["inference_count"], told["execution_count"]) == (3, 3)
    assert told["inference_stats"]["success"]["count"] == 3
    assert {"fail", "queue", "compute_input", "compute_infer", "compute_output"} < told["inference_stats"].keys()
    every = call(app, "GET", "/v2/models/stats").json["model_stats"]
    assert [model["name"] for model in every] == ["simple", "double"]  # not the one that is away


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", INFER, "POST"),
        ("DELETE", "/v2", "GET, HEAD"),
        ("POST", "/v2/models/simple", "GET, HEAD"),
        ("POST", "/v2/models/simple/goal", "GET, PUT, HEAD"),
        ("GET", "/v2/repository/index", "POST"),
        ("OPTIONS", "/v2/health/live", "GET, HEAD"),
        ("BREW", "/v2/models/stats", "GET, HEAD"),
    ],
)
def test_another_method_is_405_with_those_that_there_are(app: Rest, method: str, path: str, allowed: str) -> None:
    got = call(app, method, path)
    assert got.status == 405
    assert got.headers["allow"] == allowed
    assert allowed in got.error


# --- inference --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [INFER, "/v2/models/simple/versions/1/infer"])
def test_tensors_in_json(app: Rest, path: str) -> None:
    got = infer(app, request(id="one"), path)
    assert got.json["model_name"] == "simple"
    assert got.json["model_version"] == "1"
    assert got.json["id"] == "one"
    assert np.array_equal(outputs(got)["OUTPUT0"], A + B)
    assert np.array_equal(outputs(got)["OUTPUT1"], A - B)


def test_nested_data_and_several_rows(app: Rest) -> None:
    rows = np.arange(48, dtype=np.int32).reshape(3, 16)
    nested = {**tensor("INPUT0", rows), "data": rows.tolist()}
    got = outputs(infer(app, request(inputs=[tensor("INPUT1", rows), nested])))  # in any order
    assert np.array_equal(got["OUTPUT0"], rows + rows)


def test_the_answer_says_how_it_came_about(app: Rest) -> None:
    told = infer(app, request()).json["parameters"]
    assert told == {
        "rung": 1, "recipe": "fake(level=1)", "quality": 0.93, "quality_low": 0.91, "quality_high": 0.95,
        "queue_us": 500, "compute_us": 2000, "batch_rows": 1,
    }  # fmt: skip


def test_wishes_reach_the_runtime(app: Rest, served: FakeServed) -> None:
    wishes = {"timeout": 2500, "priority": 1, "min_quality": 0.9, "content_type": "np"}
    assert infer(app, request(parameters=wishes)).status == 200
    assert infer(app, request()).status == 200
    asked, unasked = served.asked
    assert (asked["seconds"], asked["priority"], asked["min_quality"]) == (0.0025, 1, 0.9)
    assert (unasked["seconds"], unasked["priority"], unasked["min_quality"]) == (None, 0, None)


def test_only_the_outputs_that_are_asked_for_and_in_that_order(app: Rest) -> None:
    got = infer(app, request(outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}])).json
    assert [o["name"] for o in got["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    got = infer(app, request(outputs=[{"name": "OUTPUT1", "parameters": None}])).json
    assert [o["name"] for o in got["outputs"]] == ["OUTPUT1"]
    assert len(infer(app, request(outputs=[])).json["outputs"]) == 2


def test_fields_that_are_null_count_as_left_out(app: Rest) -> None:
    body = {"id": None, "parameters": None, "outputs": None, **request()}
    assert "id" not in infer(app, body).json


@pytest.mark.parametrize("more", [{}, {"parameters": {"binary_data_output": True}}])
def test_tensors_in_binary(app: Rest, more: dict[str, Any]) -> None:
    body, headers = packed({"INPUT0": A, "INPUT1": B}, **more)
    got = call(app, "POST", INFER, body, headers)
    assert ("inference-header-content-length" in got.headers) == bool(more)
    assert got.headers["content-type"] == f"application/{'octet-stream' if more else 'json'}"
    assert np.array_equal(outputs(got)["OUTPUT0"], A + B)
    assert np.array_equal(outputs(got)["OUTPUT1"], A - B)


@pytest.mark.parametrize("length", range(0, 20, 3))
def test_binary_tensors_are_used_where_they_lie_in_the_body(length: int) -> None:
    served = FakeServed(DOUBLE, double)
    body, headers = packed({"x": np.ones((1, 4), np.float32)}, "FP32", id="i" * length)
    halves = [body[: len(body) // 2], body[len(body) // 2 :]]
    assert call(Rest(FakeShelf({"m": served})), "POST", "/v2/models/m/infer", halves, headers).status == 200
    (leaf,) = served.tickets[0].leaves
    assert leaf.flags.aligned
    assert not leaf.flags.writeable  # a view on the body; a copy could be written


def test_json_and_binary_side_by_side(app: Rest) -> None:
    body, _ = packed({"INPUT1": B})
    raw, more = to_raw(B), json.loads(body[: -len(to_raw(B))])["inputs"]
    wanted = [{"name": "OUTPUT1"}, {"name": "OUTPUT0", "parameters": {"binary_data": False}}]
    ask = {"inputs": [tensor("INPUT0", A), *more], "outputs": wanted, "parameters": {"binary_data_output": True}}
    head = json.dumps(ask).encode()
    got = call(app, "POST", INFER, head + raw, {"Inference-Header-Content-Length": str(len(head))})
    assert list(outputs(got)) == ["OUTPUT1", "OUTPUT0"]
    assert np.array_equal(outputs(got)["OUTPUT0"], A + B)
    described = json.loads(got.body[: int(got.headers["inference-header-content-length"])])["outputs"]
    assert ["data" in output for output in described] == [False, True]


def test_a_body_that_is_nothing_but_the_one_input(app: Rest) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    got = infer(app, x.tobytes(), "/v2/models/double/infer", Inference_Header_Content_Length="0")
    assert np.array_equal(outputs(got)["y"], 2 * x)
    short = infer(app, x.tobytes()[:-1], "/v2/models/double/infer", Inference_Header_Content_Length="0")
    assert short.status == 400
    assert "31 bytes" in short.error
    assert "takes INPUT0" in infer(app, b"", Inference_Header_Content_Length="0").error


def test_bytes_in_and_out() -> None:
    signature = signature_of({"text": ("object", ("batch", 1))}, {"upper": ("object", ("batch", 1))})

    def upper(leaves: list[Any]) -> list[Any]:
        answer = np.empty(leaves[0].shape, object)
        answer[:] = [[text.upper() for text in row] for row in leaves[0]]
        return [answer]

    app = Rest(FakeShelf({"up": FakeServed(signature, upper)}))
    texts = np.array([["ab"], ["é"]], object)
    got = infer(app, {"inputs": [tensor("text", texts, "BYTES")]}, "/v2/models/up/infer")
    assert got.json["outputs"][0]["data"] == ["AB", "É"]
    body, headers = packed({"text": texts}, "BYTES", parameters={"binary_data_output": True})
    raw = call(app, "POST", "/v2/models/up/infer", body, headers)
    assert raw.body.endswith(b"\x02\x00\x00\x00AB\x02\x00\x00\x00" + "É".encode())
    bare = infer(app, b"hello", "/v2/models/up/infer", Inference_Header_Content_Length="0")
    assert bare.body.endswith(b"\x05\x00\x00\x00HELLO")


def test_half_precision_is_binary_only() -> None:
    signature = signature_of({"x": ("float16", ("batch", 2))}, {"y": ("float16", ("batch", 2))})
    app = Rest(FakeShelf({"half": FakeServed(signature, lambda leaves: leaves)}))
    x = np.array([[1.5, -2]], np.float16)
    path = "/v2/models/half/infer"
    body, headers = packed({"x": x}, "FP16", parameters={"binary_data_output": True})
    assert np.array_equal(outputs(call(app, "POST", path, body, headers))["y"], x)
    as_bf16 = np.array([[0x3FC0, 0xC000]], np.uint16)
    body, headers = packed({"x": as_bf16}, "BF16", parameters={"binary_data_output": True})
    assert np.array_equal(outputs(call(app, "POST", path, body, headers))["y"], x)
    body, headers = packed({"x": x}, "FP16")
    assert "binary_data: true" in call(app, "POST", path, body, headers).error
    assert "as binary data" in infer(app, {"inputs": [tensor("x", x, "FP16")]}, path).error


@pytest.mark.parametrize("mode", ["now", "thread"])
def test_an_answer_may_be_there_at_once_or_come_from_another_thread(mode: Any) -> None:
    app = Rest(FakeShelf({"simple": FakeServed(answers=mode)}))
    assert infer(app, request()).status == 200


def test_large_bodies_are_read_and_written_beside_the_event_loop() -> None:
    app = Rest(FakeShelf({"simple": FakeServed()}))
    rows = np.arange(4000 * 16, dtype=np.int32).reshape(4000, 16)
    got = infer(app, request(inputs=[tensor("INPUT0", rows), tensor("INPUT1", rows)]))
    assert np.array_equal(outputs(got)["OUTPUT0"], rows * 2)


# --- bad input --------------------------------------------------------------------------------------------------

IN0 = tensor("INPUT0", A)
RAW = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 16]}


def with_input(**changed: Any) -> dict[str, Any]:
    return request(inputs=[{**IN0, **changed}, tensor("INPUT1", B)])


BAD: list[tuple[Any, str]] = [
    (b"", "must be a JSON object"),
    (b"{", "must be a JSON object"),
    (b"[]", "but is a list of 0"),
    (b"null", "but is nothing"),
    (b"\xff\xfe", "UTF-8"),
    (b'{"inputs": [], "inputs": []}', "'inputs' is there twice"),
    (b'{"inputs": [{"name": "INPUT0", "datatype": "INT32", "shape": [1, 16], "data": [NaN]}]}', "NaN is not JSON"),
    (b'{"a":' * 100_000, "nested too deep"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"inputs": ' + b"9" * 5000 + b"}", "must be"),
    ({}, "inputs must be a list"),
    (request(inputs={}), "inputs must be a list"),
    (request(inputs=[]), "inputs named nothing were given"),
    (request(inputs=[3]), "an object with a name"),
    (request(inputs=[{**IN0, "name": 3}]), "an object with a name"),
    (request(inputs=[IN0] * 65), "at most 64 tensors"),
    (request(inputs=[IN0]), "inputs named 'INPUT0' were given, but the model takes"),
    (request(inputs=[IN0, IN0]), "'INPUT0' is there twice"),
    (request(inputs=[IN0, tensor("INPUT2", B)]), "'INPUT2' is none of the model's; the model has INPUT0 INT32"),
    (with_input(name="x" * 10_000), "is none of the model's"),
    (with_input(shape=None), "needs a shape"),
    (with_input(shape="1"), "needs a shape"),
    (with_input(shape=[1, -16]), "none below 0"),
    (with_input(shape=[1, 15]), "takes 15 values, but 16 are there"),
    (with_input(shape=[16]), "model takes INPUT0 INT32 [-1,16]"),
    (with_input(shape=[16, 1]), "model takes INPUT0 INT32 [-1,16]"),
    (with_input(shape=[0, 16], data=[]), "at least one row"),
    (with_input(shape=[1] * 40), "at most 32"),
    (with_input(shape=[2, 16], data=[0] * 32), "must be the same"),
    (with_input(datatype=None), "needs a datatype"),
    (with_input(datatype="int32"), "there are BOOL"),
    (with_input(datatype="FP32"), "given as FP32"),
    (with_input(datatype="INT64", data=[2**40] * 16), "which holds"),
    (with_input(data=None), "needs a list as data"),
    (with_input(data="abc"), "needs a list as data"),
    (with_input(data=[1.5] * 16), "must be whole numbers, but one is 1.5"),
    (with_input(data=[2**31] * 16), "holds -2147483648 to 2147483647"),
    (with_input(data=[[[1]] * 16]), "nested deeper"),
    (with_input(more=1), "has a field 'more'"),
    (with_input(parameters={"binary_data_size": 64}), "give one of them"),
    (with_input(parameters={"binary_data_size": 64}, data=None), "Inference-Header-Content-Length"),
    (with_input(parameters={"binary_data_size": "64"}), "must be a whole number"),
    (with_input(parameters={"binary_data_size": -1}), "must be a whole number"),
    (with_input(parameters={"shared_memory_region": "a"}), "is offered here, but"),
    (with_input(parameters=[]), "must be an object"),
    (request(id=7), "id must be a string"),
    (request(ouputs=[]), "has a field 'ouputs'"),
    (request(outputs={}), "outputs must be a list"),
    (request(outputs=["OUTPUT0"]), "an object with a name"),
    (request(outputs=[{"name": "OUTPUT2"}]), "'OUTPUT2' is none of the model's; the model has OUTPUT0"),
    (request(outputs=[{"name": "OUTPUT0"}] * 2), "is there twice"),
    (request(outputs=[{"name": "OUTPUT0", "parameters": {"binary_data": 1}}]), "must be true or false"),
    (request(outputs=[{"name": "OUTPUT0", "parameters": {"classification": 3}}]), "is offered here, but"),
    (request(parameters=[]), "must be an object"),
    (request(parameters={"timeout_ms": 3}), "no parameter 'timeout_ms' of the request is offered here, but timeout,"),
    (
        request(parameters={"sequence_id": 3, "sequence_end": True}),
        "no parameter 'sequence_end', 'sequence_id' of the request",
    ),
    (request(parameters={"timeout": 0}), "the deadline has passed"),
    (request(parameters={"timeout": -5}), "the deadline has passed"),
    (request(parameters={"timeout": "5"}), "timeout is '5'"),
    (request(parameters={"timeout": 1.5}), "timeout is 1.5"),
    (request(parameters={"timeout": True}), "timeout is True"),
    (request(parameters={"timeout": 10**400}), "a whole number of 1329 bits"),
    (request(parameters={"priority": -1}), "priority is -1"),
    (request(parameters={"priority": "high"}), "priority is 'high'"),
    (request(parameters={"min_quality": "good"}), "min_quality is 'good'"),
    (request(parameters={"min_quality": 10**400}), "min_quality is"),
    (b'{"parameters": {"min_quality": 1e999}, "inputs": []}', "min_quality is inf"),
    (request(parameters={"binary_data_output": "yes"}), "must be true or false"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_a_bad_request_is_400_with_its_reason(app: Rest, served: FakeServed, body: Any, words: str) -> None:
    got = infer(app, body)
    assert got.status == 400
    assert words in got.error
    assert len(got.error) < 1000
    assert served.asked == []


@pytest.mark.parametrize(
    ("cut", "header", "words"),
    [
        (slice(None, -1), None, "takes 64 bytes of binary data, but only 63 are left"),
        (slice(None, -64), None, "but only 0 are left"),
        (slice(None, None), "9999", "but the body has only"),
        (slice(None, None), "10", "must be a JSON object"),
        (slice(None, None), "-1", "must be a whole number"),
        (slice(None, None), "1e2", "must be a whole number"),
        (slice(None, None), "9" * 30, "must be a whole number"),
        (slice(None, None), "", "must be a whole number"),
    ],
)
def test_binary_data_of_the_wrong_length_is_400(app: Rest, cut: slice, header: str | None, words: str) -> None:
    body, headers = packed({"INPUT0": A, "INPUT1": B})
    if header is not None:
        headers = {"Inference-Header-Content-Length": header}
    got = call(app, "POST", INFER, body[cut], headers)
    assert got.status == 400
    assert words in got.error


def test_more_binary_data_than_was_announced_is_400(app: Rest) -> None:
    body, headers = packed({"INPUT0": A, "INPUT1": B})
    assert "but 129 came after" in call(app, "POST", INFER, body + b"x", headers).error


def test_binary_data_that_its_shape_does_not_take_is_400(app: Rest) -> None:
    sizes = [{**RAW, "parameters": {"binary_data_size": 60}}, {**RAW, "name": "INPUT1", "data": [0] * 16}]
    head = json.dumps({"inputs": sizes}).encode()
    got = call(app, "POST", INFER, head + bytes(60), {"Inference-Header-Content-Length": str(len(head))})
    assert got.status == 400
    assert "takes 64 bytes, but 60" in got.error


def test_more_rows_than_the_server_takes_are_400(shelf: FakeShelf) -> None:
    rows = np.zeros((3, 16), np.int32)
    got = infer(Rest(shelf, Settings(max_rows=2)), request(inputs=[tensor("INPUT0", rows), tensor("INPUT1", rows)]))
    assert got.status == 400
    assert "may hold 2 rows, but this holds 3" in got.error


@pytest.mark.parametrize(
    ("headers", "status", "words"),
    [
        ({"Content-Type": "text/plain"}, 415, "must be application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "must be application/json"),
        ({"Content-Type": "application/json; charset=utf-8"}, 200, ""),
        ({"Content-Type": "application/octet-stream"}, 200, ""),
        ({"Content-Type": "application/vnd.api+json"}, 200, ""),
        ({"Content-Encoding": "br"}, 415, "only gzip and deflate"),
        ({"Content-Encoding": "gzip, gzip"}, 415, "only gzip and deflate"),
        ({"Content-Encoding": "gzip"}, 400, "can't be decompressed"),
        ({"Content-Encoding": "identity"}, 200, ""),
        ({"Content-Length": "12x"}, 400, "must be a whole number"),
        ({"Content-Length": "3"}, 400, "Content-Length is 3, but"),
        ({"Content-Length": "99999999999"}, 413, "at most"),
    ],
)
def test_headers_that_do_not_fit_the_body(app: Rest, headers: dict[str, str], status: int, words: str) -> None:
    got = call(app, "POST", INFER, json.dumps(request()).encode(), headers)
    assert got.status == status
    if words:
        assert words in got.error


@pytest.mark.parametrize("path", ["/v2/models/nope/infer", "/v2/models/simple/versions/9/infer"])
def test_an_unknown_model_is_404_in_the_words_that_clients_look_for(app: Rest, path: str) -> None:
    got = infer(app, request(), path)
    assert got.status == 404
    assert got.error.startswith("Request for unknown model")


def test_a_model_that_is_not_loaded_is_503(app: Rest) -> None:
    got = infer(app, request(), "/v2/models/away/infer")
    assert got.status == 503
    assert got.headers["retry-after"] == "1"


# --- bodies in pieces, too large, too slow, packed --------------------------------------------------------------


def test_a_body_may_come_in_any_pieces(app: Rest) -> None:
    body, headers = packed({"INPUT0": A, "INPUT1": B})
    pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
    got = run(Caller(app).call("POST", INFER, [b"", *pieces, b""], headers))
    assert np.array_equal(outputs(got)["OUTPUT0"], A + B)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_413(shelf: FakeShelf, declared: bool) -> None:
    app = Rest(shelf, Settings(max_body_bytes=300, max_json_bytes=200))
    headers = {"Content-Length": "201"} if declared else {}
    got = call(app, "POST", INFER, [b" " * 100, b" " * 101], headers)
    assert got.status == 413
    assert "200 bytes" in got.error or "at most 200" in got.error
    body, headers = packed({"INPUT0": A, "INPUT1": B}, id="i" * 300)
    assert call(app, "POST", INFER, body, headers).status == 413
    app = Rest(shelf, Settings(max_body_bytes=150))
    assert call(app, "POST", INFER, b" " * 151).status == 413


def test_json_before_binary_data_has_its_own_limit(shelf: FakeShelf) -> None:
    body, headers = packed({"INPUT0": A, "INPUT1": B}, id="i" * 300)
    got = call(Rest(shelf, Settings(max_json_bytes=200)), "POST", INFER, body, headers)
    assert got.status == 413
    assert "send binary tensors" in got.error


def test_a_body_that_does_not_come_is_408(shelf: FakeShelf) -> None:
    app = Rest(shelf, Settings(body_seconds=0.01))
    got = run(Caller(app).call("POST", INFER, b"{", ends=False))
    assert got.status == 408
    assert got.headers["connection"] == "close"
    assert "0.01 seconds" in got.error


def test_cancelling_while_a_body_comes_is_not_taken_for_slowness(app: Rest) -> None:
    async def story() -> None:
        caller = Caller(app)
        task = asyncio.ensure_future(caller.call("POST", INFER, b"{", ends=False))
        await caller.waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(story())


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_may_be_compressed(app: Rest, coding: str, pack: Any) -> None:
    body, headers = packed({"INPUT0": A, "INPUT1": B})
    got = call(app, "POST", INFER, pack(body), {**headers, "Content-Encoding": coding})
    assert np.array_equal(outputs(got)["OUTPUT0"], A + B)
    for bad in (pack(body)[:-3], pack(body) + b"more", b"", pack(body)[:5]):
        got = call(app, "POST", INFER, bad, {**headers, "Content-Encoding": coding})
        assert got.status == 400
        assert "compress" in got.error


def test_a_zip_bomb_is_413_and_is_never_unpacked(shelf: FakeShelf) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(100)) + packer.flush()
    app = Rest(shelf, Settings(max_json_bytes=2**20))
    tracemalloc.start()
    try:
        got = call(app, "POST", INFER, bomb, {"Content-Encoding": "deflate"})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert got.status == 413
    assert "decompressed" in got.error
    assert peak < 10 * 2**20


def test_large_answers_are_compressed_for_those_who_ask(shelf: FakeShelf) -> None:
    app = Rest(shelf, Settings(compress_from=100))

    def told(accept: str, binary: bool) -> tuple[str | None, dict[str, Any]]:
        ask = request(parameters={"binary_data_output": binary})
        got = call(app, "POST", INFER, json.dumps(ask).encode(), {"Accept-Encoding": accept})
        coding = got.headers.get("content-encoding")
        plain = {"gzip": gzip.decompress, "deflate": zlib.decompress, None: bytes}[coding](got.body)
        return coding, outputs(Got(got.status, got.headers, plain))

    for accept, binary, wanted in [
        ("gzip", False, "gzip"), ("deflate", False, "deflate"), ("gzip, deflate, br", False, "gzip"),
        ("gzip;q=0, deflate", False, "deflate"), ("br", False, None), ("", False, None), ("gzip;q=0", False, None),
        ("gzip", True, "gzip"), ("deflate", True, "deflate"), ("gzip, deflate", True, None),
    ]:  # fmt: skip
        coding, tensors = told(accept, binary)
        assert coding == wanted, (accept, binary)
        assert np.array_equal(tensors["OUTPUT0"], A + B)
    assert "content-encoding" not in infer(Rest(shelf), request(), Accept_Encoding="gzip").headers  # too small


# --- what the runtime does not answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("the queue is full"), 503),
        (ClosedError("it was closed"), 503),
        (DeadlineError("it waited too long"), 504),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_errors_of_the_runtime_keep_their_reason(error: Exception, status: int, late: bool) -> None:
    def fail(leaves: list[Any]) -> list[Any]:
        raise error

    served = FakeServed(SIMPLE, fail, answers="thread") if late else FakeServed(refusal=error)
    got = infer(Rest(FakeShelf({"simple": served})), request())
    assert got.status == status
    assert got.error == str(error)
    assert ("retry-after" in got.headers) == (status == 503)


def test_a_model_that_fails_is_500_with_its_reason() -> None:
    def fail(leaves: list[Any]) -> list[Any]:
        raise ValueError("a poisonous row")

    got = infer(Rest(FakeShelf({"simple": FakeServed(SIMPLE, fail)})), request())
    assert got.status == 500
    assert got.error == "a poisonous row"


def test_a_defect_of_the_server_is_500_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    app = Rest(FakeShelf({"simple": FakeServed(refusal=ZeroDivisionError("a secret"))}))
    got = infer(app, request())
    assert got.status == 500
    assert "secret" not in got.error
    assert "ZeroDivisionError: a secret" in caplog.text


def test_what_is_not_finite_is_never_written_as_json() -> None:
    app = Rest(FakeShelf({"double": FakeServed(DOUBLE, lambda leaves: [leaves[0] * np.float32("inf")])}))
    path = "/v2/models/double/infer"
    x = np.ones((1, 4), np.float32)
    got = infer(app, {"inputs": [tensor("x", x, "FP32")]}, path)
    assert got.status == 400  # the model answered: in this form the answer can't be had
    assert "NaN or infinity" in got.error
    body, headers = packed({"x": x}, "FP32", parameters={"binary_data_output": True})
    assert np.isinf(outputs(call(app, "POST", path, body, headers))["y"]).all()
    body, headers = packed({"x": x * np.float32("nan")}, "FP32")
    assert call(app, "POST", path, body, headers).status == 400  # for they brought it themselves


# --- clients that go away ---------------------------------------------------------------------------------------


def test_a_client_that_goes_away_takes_its_rows_out_of_the_queue() -> None:
    served = FakeServed(answers="held")
    app = Rest(FakeShelf({"simple": served}))

    async def story() -> None:
        leaver, stayer = Caller(app), Caller(app)
        body = json.dumps(request()).encode()
        tasks = [asyncio.ensure_future(c.call("POST", INFER, body)) for c in (leaver, stayer)]
        await leaver.waits.wait()
        await stayer.waits.wait()
        leaver.left.set()
        assert (await tasks[0]).status == 0
        assert served.tickets[0].future.cancelled()
        assert await asyncio.to_thread(served.release) == 1
        assert (await tasks[1]).status == 200

    run(story())
    assert served.counts["cancelled"] == 1


def test_a_client_that_goes_away_in_the_middle_of_its_body_is_forgotten(app: Rest, served: FakeServed) -> None:
    async def story() -> None:
        caller = Caller(app)
        task = asyncio.ensure_future(caller.call("POST", INFER, b'{"inputs":', ends=False))
        await caller.waits.wait()
        caller.left.set()
        assert (await task).status == 0

    run(story())
    assert served.asked == []


def test_a_server_that_stops_cancels_what_waits() -> None:
    served = FakeServed(answers="held")

    async def story() -> None:
        caller = Caller(Rest(FakeShelf({"simple": served})))
        task = asyncio.ensure_future(caller.call("POST", INFER, json.dumps(request()).encode()))
        await caller.waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(story())
    assert served.tickets[0].future.cancelled()


def test_an_answer_that_comes_after_the_loop_was_closed_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    served = FakeServed(answers="held")
    app = Rest(FakeShelf({"simple": served}))

    async def story() -> None:
        caller = Caller(app)
        task = asyncio.ensure_future(caller.call("POST", INFER, json.dumps(request()).encode()))
        await caller.waits.wait()
        served.tickets[0].future.set_running_or_notify_cancel()  # too late to be cancelled
        task.cancel()
        await asyncio.wait([task])

    run(story())
    with caplog.at_level(logging.WARNING):
        served.tickets[0].future.set_exception(ClosedError("late"))
    assert caplog.text == ""


def test_a_request_that_the_runtime_drops_is_503() -> None:
    served = FakeServed(answers="held")

    async def story() -> Got:
        caller = Caller(Rest(FakeShelf({"simple": served})))
        task = asyncio.ensure_future(caller.call("POST", INFER, json.dumps(request()).encode()))
        await caller.waits.wait()
        served.tickets[0].future.cancel()
        return await task

    assert run(story()).status == 503


# --- the repository, and goals ----------------------------------------------------------------------------------


def test_models_are_listed_loaded_and_unloaded(app: Rest, shelf: FakeShelf) -> None:
    def states(body: bytes = b"") -> dict[str, str]:
        return {line["name"]: line["state"] for line in call(app, "POST", "/v2/repository/index", body).json}

    assert states() == {"simple": "READY", "double": "READY", "away": "UNAVAILABLE"}
    assert states(b'{"ready": true}') == {"simple": "READY", "double": "READY"}
    got = call(app, "POST", "/v2/repository/models/away/load", b'{"parameters": {"goal": "p99 <= 5ms"}}')
    assert got.status == 200
    assert shelf.loads == [("away", {"goal": "p99 <= 5ms"})]
    assert call(app, "POST", "/v2/repository/models/simple/unload", b'{"parameters": {}}').status == 200
    assert states() == {"double": "READY", "away": "READY", "simple": "UNAVAILABLE"}
    assert call(app, "GET", "/v2/models/simple/ready").status == 503


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("index", b"[]", 400, "JSON object"),
        ("index", b'{"ready": 1}', 400, "true or false"),
        ("index", b'{"redy": true}', 400, "'redy'"),
        ("index", b"x" * 300_000, 413, "more than"),
        ("models/nope/load", b"", 404, "unknown model"),
        ("models/nope/unload", b"", 404, "unknown model"),
        ("models/simple/load", b'{"parameters": 3}', 400, "must be an object"),
        ("models/simple/load", b'{"parameters": false}', 400, "must be an object"),
        ("models/simple/unload", b'{"parameters": []}', 400, "must be an object"),
    ],
)
def test_bad_orders_to_the_repository(app: Rest, path: str, body: bytes, status: int, words: str) -> None:
    got = call(app, "POST", f"/v2/repository/{path}", body)
    assert got.status == status
    assert words in got.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(BundleError("damaged", "a file is not whole"), 400), (MissingExtraError("pip install it"), 501)],
)
def test_a_bundle_that_can_t_be_loaded_says_why(error: Exception, status: int) -> None:
    class Broken(FakeShelf):
        def load(self, name: str, parameters: Any = None) -> None:
            raise error

    got = call(Rest(Broken({})), "POST", "/v2/repository/models/m/load")
    assert got.status == status
    assert str(error) == got.error


def test_the_goal_is_changed_and_a_bad_one_is_not(app: Rest, shelf: FakeShelf) -> None:
    path = "/v2/models/simple/goal"
    assert call(app, "PUT", path, b'{"goal": "throughput >= 2000/s"}').json["goal"] == "throughput >= 2000/s"
    assert shelf.goals == {"simple": "throughput >= 2000/s"}
    for body in (b"", b"{}", b'{"goal": 3}', b'{"goal": "quick"}', b'{"goals": "p99 <= 5ms"}'):
        assert call(app, "PUT", path, body).status == 400
    assert call(app, "PUT", "/v2/models/nope/goal", b'{"goal": "p99 <= 5ms"}').status == 404
    assert shelf.goals == {"simple": "throughput >= 2000/s"}


def test_the_newest_version_answers_unless_one_is_named() -> None:
    old, new = FakeServed(), FakeServed(SIMPLE, lambda leaves: sum_and_difference([leaves[1], leaves[0]]))
    app = Rest(FakeShelf({"simple": {"1": old, "2": new}}))
    assert np.array_equal(outputs(infer(app, request()))["OUTPUT1"], B - A)
    assert np.array_equal(outputs(infer(app, request(), "/v2/models/simple/versions/1/infer"))["OUTPUT1"], A - B)
    assert call(app, "GET", "/v2/models/simple").json["versions"] == ["1", "2"]


# --- beside the protocol ----------------------------------------------------------------------------------------


def test_requests_are_traced(shelf: FakeShelf, served: FakeServed) -> None:
    class Notes:
        """Tracing and every trace of it, which notes what it is told."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def request(self, model: str, protocol: str, headers: Any = ()) -> Notes:
            self.seen.append((model, protocol, dict(headers)[b"traceparent"]))
            return self

        def answered(self, why: Any, rows: int, late: bool = False) -> None:
            self.seen.append((why.rung, rows, late))

        def __enter__(self) -> Notes:
            return self

        def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
            self.seen.append(kind and kind.__name__)

        def close(self) -> None:
            return

    notes = Notes()
    app = Rest(shelf, tracing=notes)
    assert infer(app, request(), traceparent="00-a").status == 200
    assert infer(app, b"{", traceparent="00-b").status == 400
    assert infer(app, request(), "/v2/models/away/infer", traceparent="00-c").status == 503
    begun = [("simple", "http", b"00-a"), ("simple", "http", b"00-b"), ("away", "http", b"00-c")]
    assert notes.seen == [begun[0], (1, 1, False), None, begun[1], "DataError", begun[2], "ClosedError"]


def test_it_keeps_the_lifespan_and_closes_sockets(app: Rest) -> None:
    def talk(kind: str, *messages: str) -> list[str]:
        told: list[str] = []
        heard = list(messages)

        async def receive() -> Any:
            return {"type": heard.pop(0)}

        async def send(message: Any) -> None:
            told.append(message["type"])

        run(app({"type": kind, "path": "/"}, receive, send))
        return told

    assert talk("lifespan", "lifespan.startup", "lifespan.shutdown") == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert talk("websocket", "websocket.connect") == ["websocket.close"]
