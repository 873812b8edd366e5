"""The Open Inference Protocol over gRPC: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from rpc_client import SERVICE, Client, Code, M, X, models_of_every_kind, serving, simple, twice, with_parameter
from shelf import FakeShelf

from accelerando.server.access import Settings
from accelerando.server.protocol import inference, parse


@pytest.fixture(scope="module")
def models() -> FakeShelf:
    return models_of_every_kind()


@pytest.fixture(scope="module")
def client(models: FakeShelf) -> Iterator[Client]:
    with serving(models) as client:
        yield client


# --- the server and its models ----------------------------------------------------------------------------------


def test_health_and_metadata(client: Client) -> None:
    assert client("ServerLive").live
    assert client("ServerReady").ready
    server = client("ServerMetadata")
    assert server.name == "accelerando"
    assert server.version
    assert {"statistics", "model_repository", "model_configuration"} <= set(server.extensions)
    model = client("ModelMetadata", M.ModelMetadataRequest(name="simple"))
    assert (model.name, model.platform, list(model.versions)) == ("simple", "accelerando", ["1"])
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [
        ("INPUT0", "INT32", [-1, 16]),
        ("INPUT1", "INT32", [-1, 16]),
    ]
    assert [t.name for t in model.outputs] == ["OUTPUT0", "OUTPUT1"]


def test_versions(client: Client) -> None:
    assert list(client("ModelMetadata", M.ModelMetadataRequest(name="double", version="2")).versions) == ["1", "2"]
    code, words = client.refused("ModelMetadata", M.ModelMetadataRequest(name="double", version="3"))
    assert code is Code.NOT_FOUND
    assert "'3'" in words
    for version, ready in (("", True), ("1", True), ("3", False)):
        assert client("ModelReady", M.ModelReadyRequest(name="double", version=version)).ready is ready


def test_what_is_not_loaded_or_not_known_is_not_ready(client: Client) -> None:
    for name in ("unloaded", "nobody", ""):
        assert not client("ModelReady", M.ModelReadyRequest(name=name)).ready


def test_configuration_in_tritons_form(client: Client) -> None:
    config = client("ModelConfig", M.ModelConfigRequest(name="simple")).config
    assert (config.name, config.max_batch_size) == ("simple", Settings().max_rows)
    assert [(p.name, p.data_type, list(p.dims)) for p in config.input] == [
        ("INPUT0", M.DataType.TYPE_INT32, [16]),
        ("INPUT1", M.DataType.TYPE_INT32, [16]),
    ]
    fixed = client("ModelConfig", M.ModelConfigRequest(name="fixed")).config
    assert (fixed.max_batch_size, list(fixed.input[0].dims), list(fixed.output[0].dims)) == (0, [2, 3], [2, 3])
    words = client("ModelConfig", M.ModelConfigRequest(name="words")).config
    assert (words.input[0].data_type, list(words.input[0].dims)) == (M.DataType.TYPE_STRING, [-1])


def test_statistics_of_one_and_of_all(client: Client) -> None:
    client("ModelInfer", simple())
    (one,) = client("ModelStatistics", M.ModelStatisticsRequest(name="simple")).model_stats
    assert (one.name, one.version) == ("simple", "1")
    assert one.inference_count >= 1
    assert one.inference_stats.success.count >= 1
    every = client("ModelStatistics").model_stats
    assert {(s.name, s.version) for s in every} >= {("simple", "1"), ("double", "1"), ("double", "2")}
    assert "unloaded" not in {s.name for s in every}
    assert client.refused("ModelStatistics", M.ModelStatisticsRequest(name="nobody"))[0] is Code.NOT_FOUND
    assert client.refused("ModelStatistics", M.ModelStatisticsRequest(name="unloaded"))[0] is Code.UNAVAILABLE


# --- inference --------------------------------------------------------------------------------------------------


def test_raw_in_raw_out(client: Client) -> None:
    a = np.arange(32, dtype=np.int32).reshape(2, 16)
    answer = client("ModelInfer", simple(a, a * 3, id="request-7"))
    assert (answer.model_name, answer.model_version, answer.id) == ("simple", "1", "request-7")
    assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [
        ("OUTPUT0", "INT32", [2, 16]),
        ("OUTPUT1", "INT32", [2, 16]),
    ]
    assert not any(o.HasField("contents") for o in answer.outputs)
    found = [np.frombuffer(raw, np.int32).reshape(2, 16) for raw in answer.raw_output_contents]
    assert np.array_equal(found[0], a * 4)
    assert np.array_equal(found[1], a * -2)


def test_inputs_go_by_name_not_by_place(client: Client) -> None:
    request = simple(np.full((1, 16), 5, np.int32), np.full((1, 16), 3, np.int32))
    request.inputs.reverse()
    request.raw_input_contents.reverse()
    answer = client("ModelInfer", request)
    assert np.frombuffer(answer.raw_output_contents[1], np.int32)[0] == 2


def test_requested_outputs_in_their_order(client: Client) -> None:
    request = simple(outputs=[{"name": "OUTPUT1"}, {"name": "OUTPUT0"}])
    answer = client("ModelInfer", request)
    assert [o.name for o in answer.outputs] == ["OUTPUT1", "OUTPUT0"]
    assert np.frombuffer(answer.raw_output_contents[0], np.int32)[0] == -1
    answer = client("ModelInfer", simple(outputs=[{"name": "OUTPUT1"}]))
    assert len(answer.outputs) == len(answer.raw_output_contents) == 1


def test_how_the_answer_came_about(client: Client) -> None:
    found = client("ModelInfer", twice(X)).parameters
    assert found["rung"].int64_param == 1
    assert found["recipe"].string_param == "fake(level=1)"
    assert found["quality"].double_param == 0.93
    assert found["queue_us"].int64_param == 500
    assert found["compute_us"].int64_param == 2000
    assert found["batch_rows"].int64_param == 2


FIELDS = {
    "bool": "bool_contents", "int8": "int_contents", "int16": "int_contents", "int32": "int_contents",
    "int64": "int64_contents", "uint8": "uint_contents", "uint16": "uint_contents", "uint32": "uint_contents",
    "uint64": "uint64_contents", "float32": "fp32_contents", "float64": "fp64_contents",
}  # fmt: skip
DATATYPES = {t: t.upper().replace("FLOAT", "FP") for t in FIELDS}


def extremes(kind: str) -> list[Any]:
    dtype = np.dtype(kind)
    if dtype.kind == "b":
        return [True, False]
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return [limits.min.item(), limits.max.item()] if dtype.kind == "f" else [limits.min, limits.max]


def test_every_datatype_typed_and_raw(client: Client) -> None:
    typed = M.ModelInferRequest(model_name="all")
    raw = M.ModelInferRequest(model_name="all")
    for kind, field in FIELDS.items():
        tensor = typed.inputs.add(name=f"in_{kind}", datatype=DATATYPES[kind], shape=[1, 2])
        getattr(tensor.contents, field).extend(extremes(kind))
        raw.inputs.add(name=f"in_{kind}", datatype=DATATYPES[kind], shape=[1, 2])
        raw.raw_input_contents.append(np.array(extremes(kind), kind).tobytes())
    answer = client("ModelInfer", typed)
    assert not answer.raw_output_contents
    for output, (kind, field) in zip(answer.outputs, FIELDS.items(), strict=True):
        assert (output.name, output.datatype) == (f"out_{kind}", DATATYPES[kind])
        assert list(getattr(output.contents, field)) == extremes(kind)
    answer = client("ModelInfer", raw)
    for data, kind in zip(answer.raw_output_contents, FIELDS, strict=True):
        assert np.array_equal(np.frombuffer(data, kind), np.array(extremes(kind), kind))


def test_strings_typed_and_raw(client: Client) -> None:
    typed = M.ModelInferRequest(model_name="words")
    tensor = typed.inputs.add(name="text", datatype="BYTES", shape=[1, 3])
    tensor.contents.bytes_contents.extend([b"loud", "größe".encode(), b""])
    answer = client("ModelInfer", typed)
    assert list(answer.outputs[0].contents.bytes_contents) == [b"LOUD", "GRÖSSE".encode(), b""]
    raw = M.ModelInferRequest(model_name="words", raw_input_contents=[b"\x02\0\0\0ab\0\0\0\0"])
    raw.inputs.add(name="text", datatype="BYTES", shape=[2, 1])
    answer = client("ModelInfer", raw)
    assert answer.raw_output_contents[0] == b"\x02\0\0\0AB\0\0\0\0"
    assert list(answer.outputs[0].shape) == [2, 1]


def test_half_floats_are_raw_whatever_was_asked_for(client: Client) -> None:
    x = np.array([[1.5, -2.0]], np.float16)
    request = with_parameter(twice(x, "halves"), "binary_data_output", False)
    answer = client("ModelInfer", request)
    assert answer.outputs[0].datatype == "FP16"
    assert np.array_equal(np.frombuffer(answer.raw_output_contents[0], np.float16), x[0])
    request.ClearField("raw_input_contents")
    assert client.refused("ModelInfer", request)[0] is Code.INVALID_ARGUMENT


def test_the_client_may_choose_the_form_of_the_answer(client: Client) -> None:
    answer = client("ModelInfer", with_parameter(twice(X), "binary_data_output", False))
    assert list(answer.outputs[0].contents.fp32_contents) == (X * 2).ravel().tolist()
    request = twice(X)
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp32_contents.extend(X.ravel())
    assert client("ModelInfer", request).outputs[0].contents.fp32_contents[1] == 2.0
    answer = client("ModelInfer", with_parameter(request, "binary_data_output", True))
    assert np.frombuffer(answer.raw_output_contents[0], np.float32)[1] == 2.0


def test_a_server_that_is_always_raw(models: FakeShelf) -> None:
    request = twice(X)
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp32_contents.extend(X.ravel())
    with serving(models, always_raw=True) as client:
        answer = client("ModelInfer", request)
        assert np.frombuffer(answer.raw_output_contents[0], np.float32)[1] == 2.0
        answer = client("ModelInfer", with_parameter(request, "binary_data_output", False))
        assert answer.outputs[0].contents.fp32_contents[1] == 2.0


def test_a_large_tensor_goes_through_whole(client: Client) -> None:
    words = [b"x" * 99] * 4000  # so large that a thread does it
    request = M.ModelInferRequest(model_name="words")
    request.inputs.add(name="text", datatype="BYTES", shape=[4000, 1]).contents.bytes_contents.extend(words)
    answer = client("ModelInfer", request)
    assert list(answer.outputs[0].contents.bytes_contents) == [b"X" * 99] * 4000


def test_what_is_asked_for_reaches_the_model(models: FakeShelf, client: Client) -> None:
    served = models.find("double", "1")
    request = twice(X)
    request.model_version = "1"
    request.parameters["priority"].uint64_param = 1
    with_parameter(with_parameter(request, "timeout", 250_000), "min_quality", 0.9)
    client("ModelInfer", request)
    asked = served.asked[-1]
    assert (asked["seconds"], asked["min_quality"], asked["priority"]) == (0.25, 0.9, 1)
    client("ModelInfer", with_parameter(request, "min_quality", 1))
    assert served.asked[-1]["min_quality"] == 1.0


def test_the_clients_own_deadline_is_the_requests_too(models: FakeShelf, client: Client) -> None:
    served, request = models.find("double", "1"), twice(X)
    request.model_version = "1"
    client("ModelInfer", request, timeout=None)
    assert served.asked[-1]["seconds"] is None
    client("ModelInfer", request, timeout=7)
    assert 5 < served.asked[-1]["seconds"] < 7.5, "grpc rounds it up when it travels"
    client("ModelInfer", with_parameter(request, "timeout", 60_000_000), timeout=7)
    assert served.asked[-1]["seconds"] < 7.5, "the earlier of the two counts"


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("nobody", Code.NOT_FOUND, "Request for unknown model"),
        ("", Code.NOT_FOUND, "Request for unknown model"),
        ("unloaded", Code.UNAVAILABLE, "not loaded"),
        ("closed", Code.UNAVAILABLE, "being let go"),
        ("busy", Code.RESOURCE_EXHAUSTED, "the queue is full"),
        ("late", Code.DEADLINE_EXCEEDED, "its deadline passed"),
        ("poisoned", Code.INTERNAL, "divides by zero"),
        ("broken", Code.INTERNAL, "an error of the server's own"),
    ],
)
def test_every_error_has_its_status(client: Client, model: str, code: Any, words: str) -> None:
    found, told = client.refused("ModelInfer", twice(X, model))
    assert found is code
    assert words in told
    assert "secret" not in told, "what is wrong with the server is its log's business"


Change = Callable[[Any], Any]


def shaped(*shape: int) -> Change:
    return lambda r: r.inputs[0].shape.__setitem__(slice(None), shape)


def changed(**fields: Any) -> Change:
    return lambda r: [setattr(r.inputs[0], name, value) for name, value in fields.items()]


def raw(change: Callable[[bytes], bytes]) -> Change:
    return lambda r: r.raw_input_contents.__setitem__(0, change(r.raw_input_contents[0]))


def parameter(name: str, value: Any) -> Change:
    return lambda r: with_parameter(r, name, value)


def outputs(*names: str) -> Change:
    return lambda r: [r.outputs.add(name=name) for name in names]


def all_of(*changes: Change) -> Change:
    return lambda r: [change(r) for change in changes]


def without(*fields: str) -> Change:
    return lambda r: [r.ClearField(field) for field in fields]


MIXED = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
BAD: dict[str, tuple[Change, str]] = {
    "raw and typed": (lambda r: r.inputs[0].contents.int_contents.append(1), MIXED),
    "one raw for two": (lambda r: r.raw_input_contents.pop(), "1 raw_input_contents"),
    "truncated": (raw(lambda data: data[:-1]), "63"),
    "oversized": (raw(lambda data: data + b"!"), "65"),
    "neither": (without("raw_input_contents"), "0 are there"),
    "another shape": (shaped(2, 8), "INPUT0"),
    "a negative axis": (shaped(-1, 16), "INPUT0"),
    "an overflowing shape": (shaped(2**62, 2**62), "INPUT0"),
    "too many axes": (shaped(*[1] * 100), "INPUT0"),
    "another datatype": (changed(datatype="FP32"), "INPUT0"),
    "no such datatype": (changed(datatype="INT33"), "INT33"),
    "no datatype": (changed(datatype=""), "INPUT0"),
    "an unknown input": (changed(name="INPUT9"), "INPUT9"),
    "an input twice": (changed(name="INPUT1"), "twice"),
    "a missing input": (lambda r: (r.inputs.pop(), r.raw_input_contents.pop()), "INPUT1"),
    "no inputs": (without("inputs", "raw_input_contents"), "INPUT0"),
    "batches that differ": (all_of(shaped(2, 16), raw(lambda data: data * 2)), "batch"),
    "an unknown output": (outputs("OUTPUT9"), "OUTPUT9"),
    "an output twice": (outputs("OUTPUT0", "OUTPUT0"), "twice"),
    "a sequence": (parameter("sequence_id", 7), "sequence_id"),
    "a misspelt parameter": (parameter("min_qualty", 0.9), "min_qualty"),
    "a timeout that is past": (parameter("timeout", -1), "timeout"),
    "a timeout in words": (parameter("timeout", "1s"), "timeout"),
    "a negative priority": (parameter("priority", -1), "priority"),
    "a quality in words": (parameter("min_quality", "good"), "min_quality"),
    "a quality that is no number": (parameter("min_quality", float("nan")), "min_quality"),
    "a parameter without a value": (lambda r: r.parameters["timeout"].SetInParent(), "timeout"),
    "a form in words": (parameter("binary_data_output", "yes"), "binary_data_output"),
    "too many inputs": (lambda r: [r.inputs.add(name=str(i)) for i in range(100)], "inputs"),
    "too many outputs": (outputs(*map(str, range(100))), "outputs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_what_is_wrong(client: Client, name: str) -> None:
    spoil, words = BAD[name]
    request = simple()
    spoil(request)
    code, told = client.refused("ModelInfer", request)
    assert code is Code.INVALID_ARGUMENT
    assert words in told


def test_no_rows(client: Client) -> None:
    code, words = client.refused("ModelInfer", twice(np.zeros((0, 4), np.float32)))
    assert (code, "at least one row" in words) == (Code.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("name", ["classification", "shared_memory_region", "binary_data"])
def test_parameters_of_tensors_are_not_passed_over_in_silence(client: Client, name: str) -> None:
    request = simple()
    request.inputs[0].parameters[name].bool_param = True
    code, words = client.refused("ModelInfer", request)
    assert (code, name in words) == (Code.INVALID_ARGUMENT, True)
    request = simple()
    request.outputs.add(name="OUTPUT0").parameters[name].bool_param = True
    code, words = client.refused("ModelInfer", request)
    assert (code, name in words) == (Code.INVALID_ARGUMENT, True)


def test_typed_contents_in_another_field_or_out_of_range(client: Client) -> None:
    request = M.ModelInferRequest(model_name="all")
    tensor = request.inputs.add(name="in_int8", datatype="INT8", shape=[1, 2])
    tensor.contents.int_contents.extend([1, 200])
    code, words = client.refused("ModelInfer", request)
    assert (code, "200" in words) == (Code.INVALID_ARGUMENT, True)
    tensor.contents.Clear()
    tensor.contents.int64_contents.extend([1, 2])
    code, words = client.refused("ModelInfer", request)
    assert (code, "int_contents" in words) == (Code.INVALID_ARGUMENT, True)


def test_more_rows_than_are_taken(models: FakeShelf) -> None:
    with serving(models, Settings(max_rows=2)) as small:
        small("ModelInfer", twice(X))
        code, words = small.refused("ModelInfer", twice(np.zeros((3, 4), np.float32)))
        assert (code, "3" in words) == (Code.INVALID_ARGUMENT, True)


def test_bytes_that_are_no_message(client: Client) -> None:
    for method in set(inference().methods) - {"ModelStreamInfer"}:
        code, words = client.refused(method, b"\xff\xff\xff")
        assert (code, "3 bytes" in words) == (Code.INVALID_ARGUMENT, True)


def test_a_long_name_gets_a_short_answer(client: Client) -> None:
    code, words = client.refused("ModelInfer", M.ModelInferRequest(model_name="ü" * 100_000))
    assert code is Code.NOT_FOUND
    assert len(words) < 2_000


def test_an_oversized_message(models: FakeShelf) -> None:
    with serving(models, Settings(max_body_bytes=10_000)) as small:
        assert small.refused("ModelInfer", twice(np.zeros((1000, 4), np.float32)))[0] is Code.RESOURCE_EXHAUSTED
        bomb = twice(np.zeros((100_000, 4), np.float32))
        assert len(gzip.compress(bomb.SerializeToString())) < 10_000
        code, _ = small.refused("ModelInfer", bomb, compression=grpc.Compression.Gzip)
        assert code is Code.RESOURCE_EXHAUSTED
        small("ModelInfer", twice(X))


@pytest.mark.parametrize(
    "name", ["SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings"]
)
def test_what_is_not_offered_says_so(client: Client, name: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.channel.unary_unary(f"/{SERVICE}/{name}")(b"", timeout=20)
    assert caught.value.code() is Code.UNIMPLEMENTED
    assert caught.value.details() != "Method not found!"


def test_compressed_requests_and_answers(models: FakeShelf, client: Client) -> None:
    for kind in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        answer = client("ModelInfer", twice(X), compression=kind)
        assert np.frombuffer(answer.raw_output_contents[0], np.float32)[1] == 2.0
    with serving(models, compression="gzip") as packed:
        assert np.frombuffer(packed("ModelInfer", twice(X)).raw_output_contents[0], np.float32)[1] == 2.0


# --- the messages themselves ------------------------------------------------------------------------------------


def test_the_messages_are_not_in_the_pool_that_all_share() -> None:
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")


@pytest.mark.parametrize(
    "text",
    [
        "banana;",
        'syntax = "proto2";',
        "message A { string a = 1; ",
        "message A { string a 1; }",
        "message A { string a = one; }",
        "message A ( string a = 1; )",
        "service S { call A(B) returns (C) {} }",
        "service S { rpc A(B) gives (C) {} }",
        "enum E { A: 0; }",
    ],
)
def test_a_protocol_file_with_what_is_not_known_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"was found|ends where|invalid literal"):
        parse("a.proto", text)
