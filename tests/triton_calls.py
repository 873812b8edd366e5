"""Asks a server everything that tritonclient can ask.  It runs in `.venv-triton`, where nothing of ours is installed.

    .venv-triton/bin/python tests/triton_calls.py HTTP_ADDRESS GRPC_ADDRESS DESCRIPTION

DESCRIPTION is a file with our protocol, as a serialized FileDescriptorProto.  Every function whose name begins with
`check_` is called; those with a parameter `kit` twice, once for each protocol.  A line `ok NAME` is written for each
that passes, a traceback for each that fails; the exit status is the number of those.

The server has the models that `test_tritonclient.py` lists.  What is asked follows the examples in
github.com/triton-inference-server/client, src/python/examples.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor, np_to_triton_dtype

A = np.arange(16, dtype=np.int32)[None]
B = np.ones((1, 16), np.int32)
WHOLE = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
EXTREMES: dict[str, tuple[Any, Any]] = {
    "bool": (False, True),
    **{name: (np.iinfo(name).min, np.iinfo(name).max) for name in WHOLE},
    **{name: (np.finfo(name).min, np.finfo(name).max) for name in ("float16", "float32", "float64")},
}


@dataclass(frozen=True)
class Kit:
    """One of the two protocols."""

    name: str
    library: Any
    client: Any
    url: str

    def input(self, name: str, array: Any, **how: Any) -> Any:
        tensor = self.library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        return tensor.set_data_from_numpy(array, **how)

    def simple(self, a: Any = A, b: Any = B) -> list[Any]:
        return [self.input("INPUT0", a), self.input("INPUT1", b)]

    def told(self, what: Callable[..., Any], *args: Any) -> Any:
        """Plain data from a call that answers with a message or with JSON."""
        return what(*args, as_json=True) if self.name == "grpc" else what(*args)

    def response(self, result: Any) -> Any:
        return result.get_response(as_json=True) if self.name == "grpc" else result.get_response()


def expect(true: bool, what: object = "") -> None:
    if not true:
        raise AssertionError(what)


def refused(call: Callable[[], Any], words: str, statuses: tuple[str, ...] = ()) -> None:
    """The call must fail with the client's own error, our text, and one of these statuses."""
    try:
        found = call()
    except InferenceServerException as error:
        expect(words in error.message(), f"{words!r} is not in {error.message()!r}")
        expect(not statuses or error.status() in statuses, error.status())
    else:
        raise AssertionError(f"it was not refused, but answered {found}")


def right(result: Any, a: Any = A, b: Any = B) -> None:
    expect(np.array_equal(result.as_numpy("OUTPUT0"), a + b), "the sum is wrong")
    expect(np.array_equal(result.as_numpy("OUTPUT1"), a - b), "the difference is wrong")


# --- health, metadata, configuration, statistics ----------------------------------------------------------------


def check_health(kit: Kit) -> None:
    headers = {"test": "1", "dummy": "2"}
    expect(kit.client.is_server_live(headers=headers))
    expect(kit.client.is_server_ready())
    expect(kit.client.is_model_ready("simple"))
    expect(kit.client.is_model_ready("simple", "1"))
    expect(not kit.client.is_model_ready("wrong_model_name"))
    expect(not kit.client.is_model_ready("simple", "99"))


def check_metadata(kit: Kit) -> None:
    server = kit.told(kit.client.get_server_metadata)
    expect(server["name"] == "triton", server)
    expect("statistics" in server["extensions"], server)
    model = kit.told(kit.client.get_model_metadata, "simple")
    expect(model["name"] == "simple", model)
    expect(model["versions"] == ["1"], model)
    expect([t["name"] for t in model["inputs"]] == ["INPUT0", "INPUT1"], model)
    expect([list(map(int, t["shape"])) for t in model["outputs"]] == [[-1, 16]] * 2, model)
    expect({t["datatype"] for t in model["inputs"]} == {"INT32"}, model)
    refused(lambda: kit.client.get_model_metadata("wrong_model_name"), "Request for unknown model")


def check_configuration(kit: Kit) -> None:
    found = kit.told(kit.client.get_model_config, "simple")
    config = found["config"] if kit.name == "grpc" else found
    expect(config["name"] == "simple", config)
    expect(config["max_batch_size"] > 0, config)
    expect([(p["name"], p["data_type"], list(map(int, p["dims"]))) for p in config["input"]]
           == [("INPUT0", "TYPE_INT32", [16]), ("INPUT1", "TYPE_INT32", [16])], config)  # fmt: skip


def check_statistics(kit: Kit) -> None:
    kit.client.infer("simple", kit.simple())
    (one,) = kit.told(kit.client.get_inference_statistics, "simple")["model_stats"]
    expect(one["name"] == "simple", one)
    expect(int(one["inference_count"]) > 0, one)
    expect(int(one["inference_stats"]["success"]["count"]) > 0, one)
    every = kit.told(kit.client.get_inference_statistics)["model_stats"]
    expect({"simple", "simple_string"} <= {model["name"] for model in every}, every)


# --- inference --------------------------------------------------------------------------------------------------


def check_infer(kit: Kit) -> None:
    both = [kit.library.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
    right(kit.client.infer("simple", kit.simple(), outputs=both, headers={"test": "1"}))
    right(kit.client.infer("simple", kit.simple()))
    right(kit.client.infer("simple", kit.simple(), model_version="1"))
    many = np.arange(64, dtype=np.int32).reshape(4, 16)
    right(kit.client.infer("simple", kit.simple(many, many * 3)), many, many * 3)


def check_json_and_binary_side_by_side() -> None:
    kit = KITS[0]
    inputs = [kit.input("INPUT0", A, binary_data=False), kit.input("INPUT1", -B, binary_data=True)]
    for binary in ((True, False), (False, True), (False, False), (True, True)):
        outputs = [
            httpclient.InferRequestedOutput(name, binary_data=yes)
            for name, yes in zip(("OUTPUT0", "OUTPUT1"), binary, strict=True)
        ]
        result = kit.client.infer("simple", inputs, outputs=outputs, query_params={"test_1": 1})
        right(result, A, -B)
        kept = ["data" in output for output in result.get_response()["outputs"]]
        expect(kept == [not yes for yes in binary], result.get_response())
    inputs[1].set_data_from_numpy(-B, binary_data=False)
    right(kit.client.infer("simple", inputs), A, -B)


def check_one_output_and_their_order(kit: Kit) -> None:
    outputs = [kit.library.InferRequestedOutput(name) for name in ("OUTPUT1", "OUTPUT0")]
    right(kit.client.infer("simple", kit.simple(), outputs=outputs))
    result = kit.client.infer("simple", kit.simple(), outputs=outputs[:1])
    expect(result.as_numpy("OUTPUT0") is None)
    expect(np.array_equal(result.as_numpy("OUTPUT1"), A - B))
    expect(result.get_output("OUTPUT1") is not None)


def check_every_datatype(kit: Kit) -> None:
    for name, ends in EXTREMES.items():
        sent = np.array([ends], name)
        for how in ({},) if kit.name == "grpc" or name == "float16" else ({}, {"binary_data": False}):
            got = kit.client.infer(f"same_{name}", [kit.input("x", sent, **how)]).as_numpy("y")
            expect(got.dtype == sent.dtype, (got.dtype, name))
            expect(np.array_equal(got, sent), (name, how, got, sent))


def check_strings(kit: Kit) -> None:
    a, b = (np.array([[str(int(x)).encode() for x in row[0]]], np.object_) for row in (A, B))
    result = kit.client.infer("simple_string", [kit.input("INPUT0", a), kit.input("INPUT1", b)])
    for name, want in (("OUTPUT0", A + B), ("OUTPUT1", A - B)):
        found = result.as_numpy(name)
        expect([[int(x) for x in row] for row in found] == want.tolist(), found)
    words = np.array([["größe".encode(), b"", b"\xe2\x82\xac 5"]], np.object_)
    expect(np.array_equal(kit.client.infer("same_text", [kit.input("x", words)]).as_numpy("y"), words))
    if kit.name == "http":
        outputs = [httpclient.InferRequestedOutput("y", binary_data=False)]
        result = kit.client.infer("same_text", [kit.input("x", words, binary_data=False)], outputs=outputs)
        expect(result.as_numpy("y").tolist() == [["größe", "", "€ 5"]], result.as_numpy("y"))


def check_explicit_contents() -> None:
    """Typed contents, as the examples fill them in by hand; they read the answer raw, which is asked for here."""
    with grpc.insecure_channel(KITS[1].url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="simple")
        for name, array in (("INPUT0", A), ("INPUT1", B)):
            tensor = request.inputs.add(name=name, datatype="INT32", shape=[1, 16])
            tensor.contents.int_contents[:] = array[0].tolist()
        typed = stub.ModelInfer(request)
        expect(list(typed.outputs[0].contents.int_contents) == (A + B)[0].tolist(), typed)
        request.parameters["binary_data_output"].bool_param = True
        raw = stub.ModelInfer(request)
        expect(np.frombuffer(raw.raw_output_contents[1], np.int32).tolist() == (A - B)[0].tolist(), raw)
        request.raw_input_contents.append(A.tobytes())
        request.inputs[0].contents.int_contents[:] = [1] * 8
        request.raw_input_contents.append(B.tobytes())
        try:
            stub.ModelInfer(request)
        except grpc.RpcError as error:
            words = "contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"
            expect(words in error.details(), error.details())
        else:
            raise AssertionError("raw and typed contents went through together")
        text = service_pb2.ModelInferRequest(model_name="same_text")
        tensor = text.inputs.add(name="x", datatype="BYTES", shape=[1, 2])
        tensor.contents.bytes_contents.extend([b"one", b"two"])
        text.parameters["binary_data_output"].bool_param = True
        found = deserialize_bytes_tensor(stub.ModelInfer(text).raw_output_contents[0])
        expect(found.tolist() == [b"one", b"two"], found)


def check_request_id_and_parameters(kit: Kit) -> None:
    result = kit.client.infer("simple", kit.simple(), request_id="request-7", timeout=2_000_000, priority=1,
                              parameters={"min_quality": 0.5})  # fmt: skip
    response = kit.response(result)
    expect(response["id"] == "request-7", response)
    expect(response["model_name"] == "simple", response)
    expect(
        {"rung", "recipe", "quality", "queue_us", "compute_us", "batch_rows"} <= set(response["parameters"]), response
    )
    right(result)


def check_compression() -> None:
    http, rpc = KITS
    big = np.tile(A, (500, 1))
    for kind in ("gzip", "deflate"):
        right(
            http.client.infer("simple", http.simple(big, big), request_compression_algorithm=kind,
                              response_compression_algorithm=kind), big, big)  # fmt: skip
        right(rpc.client.infer("simple", rpc.simple(big, big), compression_algorithm=kind), big, big)


def check_objects_can_be_used_again(kit: Kit) -> None:
    inputs, outputs = (
        kit.simple(),
        [kit.library.InferRequestedOutput("OUTPUT0"), kit.library.InferRequestedOutput("OUTPUT1")],
    )
    for factor in (1, 2, 3):
        inputs[1].set_data_from_numpy(B * factor)
        right(kit.client.infer("simple", inputs, outputs=outputs), A, B * factor)


# --- at once, later, in a stream --------------------------------------------------------------------------------


def check_async_infer() -> None:
    http, rpc = KITS
    for asked in [http.client.async_infer("simple", http.simple()) for _ in range(5)]:
        right(asked.get_result())
    done: queue.Queue[Any] = queue.Queue()
    for _ in range(5):
        rpc.client.async_infer("simple", rpc.simple(), callback=lambda result, error: done.put((result, error)))
    for _ in range(5):
        result, error = done.get(timeout=20)
        expect(error is None, error)
        right(result)


def check_stream() -> None:
    rpc, done = KITS[1], queue.Queue()
    rpc.client.start_stream(callback=lambda result, error: done.put((result, error)))
    try:
        for i in range(3):
            rpc.client.async_stream_infer("simple", rpc.simple(A, B * i), request_id=str(i))
        rpc.client.async_stream_infer("wrong_model_name", rpc.simple())
        rpc.client.async_stream_infer("simple", rpc.simple(), request_id="last", enable_empty_final_response=True)
        for i in range(3):
            result, error = done.get(timeout=20)
            expect(error is None, error)
            expect(result.get_response().id == str(i))
            right(result, A, B * i)
        result, error = done.get(timeout=20)
        expect(result is None)
        expect("Request for unknown model" in error.message(), error)
        result, error = done.get(timeout=20)
        expect(result.get_response().parameters["triton_final_response"].bool_param, result.get_response())
        right(result)
    finally:
        rpc.client.stop_stream()


def check_asyncio() -> None:
    http, rpc = KITS

    async def both() -> None:
        async with httpaio.InferenceServerClient(http.url) as client:
            expect(await client.is_server_live())
            expect(await client.is_model_ready("simple"))
            expect((await client.get_model_metadata("simple"))["name"] == "simple")
            for result in await asyncio.gather(*(client.infer("simple", http.simple()) for _ in range(5))):
                right(result)
            plain = [http.input("INPUT0", A, binary_data=False), http.input("INPUT1", B, binary_data=False)]
            right(await client.infer("simple", plain))
            right(await client.infer("simple", http.simple(), request_compression_algorithm="gzip",
                                     response_compression_algorithm="gzip"))  # fmt: skip
            try:
                await client.infer("wrong_model_name", http.simple())
            except InferenceServerException as error:
                expect(error.message().startswith("Request for unknown model"), error.message())
            else:
                raise AssertionError("a model that is not there answered")
        async with grpcaio.InferenceServerClient(rpc.url) as client:
            expect(await client.is_server_ready())
            expect((await client.get_model_config("simple", as_json=True))["config"]["name"] == "simple")
            for result in await asyncio.gather(*(client.infer("simple", rpc.simple()) for _ in range(5))):
                right(result)

            async def requests() -> Any:
                for i in range(3):
                    yield {"model_name": "simple", "inputs": rpc.simple(A, B * i), "request_id": str(i)}

            i = 0
            async for result, error in client.stream_infer(requests()):
                expect(error is None, error)
                right(result, A, B * i)
                i += 1
            expect(i == 3)

    asyncio.run(both())


# --- the repository ---------------------------------------------------------------------------------------------


def check_model_control(kit: Kit) -> None:
    found = kit.told(kit.client.get_model_repository_index)
    models = {m["name"]: m for m in (found.get("models", []) if kit.name == "grpc" else found)}
    expect(models["simple"]["state"] == "READY", models)
    kit.client.load_model("simple")
    expect(kit.client.is_model_ready("simple"))
    kit.client.unload_model("simple_string")
    expect(not kit.client.is_model_ready("simple_string"))
    refused(lambda: kit.client.infer("simple_string", kit.simple()), "not loaded", ("503", "StatusCode.UNAVAILABLE"))
    kit.client.load_model("simple_string")
    expect(kit.client.is_model_ready("simple_string"))
    refused(lambda: kit.client.load_model("wrong_model_name"), "wrong_model_name", ("404", "StatusCode.NOT_FOUND"))
    refused(lambda: kit.client.unload_model("wrong_model_name"), "wrong_model_name")


# --- errors and deadlines ---------------------------------------------------------------------------------------


def check_errors_have_our_text(kit: Kit) -> None:
    infer, bad = kit.client.infer, ("400", "StatusCode.INVALID_ARGUMENT")
    refused(
        lambda: infer("wrong_model_name", kit.simple()), "Request for unknown model", ("404", "StatusCode.NOT_FOUND")
    )
    refused(lambda: infer("simple", kit.simple()[:1]), "INPUT1", bad)
    refused(lambda: infer("simple", kit.simple(A[:, :8], B[:, :8])), "INPUT0", bad)
    refused(lambda: infer("simple", [kit.input("INPUT0", A.astype(np.float32)), kit.input("INPUT1", B)]), "FP32", bad)
    refused(lambda: infer("simple", kit.simple(), parameters={"min_qualty": 0.5}), "min_qualty", bad)
    refused(lambda: infer("simple", kit.simple(), sequence_id=5), "sequence_id", bad)
    nothing = [kit.library.InferRequestedOutput("OUTPUT9")]
    refused(lambda: infer("simple", kit.simple(), outputs=nothing), "OUTPUT9", bad)
    classes = [kit.library.InferRequestedOutput("OUTPUT0", class_count=3)]
    refused(lambda: infer("simple", kit.simple(), outputs=classes), "classification", bad)
    refused(lambda: infer("busy", kit.simple()), "the queue is full", ("503", "StatusCode.RESOURCE_EXHAUSTED"))
    refused(lambda: infer("late", kit.simple()), "its deadline passed", ("504", "StatusCode.DEADLINE_EXCEEDED"))
    refused(lambda: infer("poisoned", kit.simple()), "row 0", ("500", "StatusCode.INTERNAL"))
    refused(kit.client.get_system_shared_memory_status, "", ("404", "501", "StatusCode.UNIMPLEMENTED"))
    right(infer("simple", kit.simple()))


def check_client_timeout() -> None:
    """A model that never answers: the client gives up when it said that it would."""
    http, rpc = KITS
    refused(lambda: rpc.client.infer("silent", rpc.simple(), client_timeout=0.3), "", ("StatusCode.DEADLINE_EXCEEDED",))
    with httpclient.InferenceServerClient(http.url, network_timeout=0.3) as impatient:
        try:
            impatient.infer("silent", http.simple())
        except (TimeoutError, OSError, InferenceServerException) as error:
            expect("timed out" in str(error), error)
        else:
            raise AssertionError("a model that never answers has answered")
    right(rpc.client.infer("simple", rpc.simple(), client_timeout=20))


def check_cancel() -> None:
    rpc, done = KITS[1], queue.Queue()
    asked = rpc.client.async_infer("silent", rpc.simple(), callback=lambda result, error: done.put((result, error)))
    asked.cancel()
    result, error = done.get(timeout=20)
    expect(result is None)
    expect("ancelled" in str(error), error)


def check_keepalive() -> None:
    options = grpcclient.KeepAliveOptions(
        keepalive_time_ms=10_000, keepalive_timeout_ms=5_000, keepalive_permit_without_calls=True,
        http2_max_pings_without_data=0,
    )  # fmt: skip
    with grpcclient.InferenceServerClient(KITS[1].url, keepalive_options=options) as client:
        right(client.infer("simple", KITS[1].simple()))


# --- the messages -----------------------------------------------------------------------------------------------


def check_fields_have_the_same_numbers() -> None:
    """Every message, field and value of ours is in their files too, and the same."""
    ours = descriptor_pb2.FileDescriptorProto.FromString(Path(sys.argv[3]).read_bytes())
    theirs, count = {}, 0
    for file in (service_pb2, model_config_pb2):
        known = descriptor_pb2.FileDescriptorProto()
        file.DESCRIPTOR.CopyToProto(known)
        theirs.update({m.name: m for m in (*known.message_type, *known.enum_type, *known.service)})
    for message in ours.message_type:
        count += same_fields(message, theirs[message.name], message.name)
    for enum in ours.enum_type:
        expect({v.name: v.number for v in enum.value} == {v.name: v.number for v in theirs[enum.name].value}, enum.name)
    for service in ours.service:
        known_methods = {m.name: m for m in theirs[service.name].method}
        for method in service.method:
            other = known_methods[method.name]
            for what in ("input_type", "output_type", "client_streaming", "server_streaming"):
                expect(getattr(method, what) == getattr(other, what), f"{what} of {method.name}")
    expect(count > 100, f"only {count} fields were compared")


def same_fields(ours: Any, theirs: Any, where: str) -> int:
    known = {field.name: field for field in theirs.field}
    for field in ours.field:
        other = known[field.name]
        for what in ("number", "label", "type", "type_name"):
            expect(getattr(field, what) == getattr(other, what), f"{what} of {where}.{field.name}")
        expect(field.HasField("oneof_index") == other.HasField("oneof_index"), f"{where}.{field.name}")
    nested = {message.name: message for message in theirs.nested_type}
    for message in ours.nested_type:
        expect(message.options.map_entry == nested[message.name].options.map_entry, f"{where}.{message.name}")
    return len(ours.field) + sum(same_fields(m, nested[m.name], f"{where}.{m.name}") for m in ours.nested_type)


# --- all of them ------------------------------------------------------------------------------------------------

KITS: list[Kit] = []


def main() -> int:
    http, rpc = sys.argv[1:3]
    KITS.append(Kit("http", httpclient, httpclient.InferenceServerClient(http, concurrency=5), http))
    KITS.append(Kit("grpc", grpcclient, grpcclient.InferenceServerClient(rpc), rpc))
    failures = 0
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        for kit in KITS if inspect.signature(check).parameters else (None,):
            title = f"{name} over {kit.name}" if kit else name
            try:
                check(*([kit] if kit else []))
            except Exception:  # noqa: BLE001  the next ones may tell more
                failures += 1
                sys.stdout.write(f"FAILED {title}\n{traceback.format_exc()}\n")
            else:
                sys.stdout.write(f"ok {title}\n")
    for kit in KITS:
        kit.client.close()
    return failures


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.exit(code)
