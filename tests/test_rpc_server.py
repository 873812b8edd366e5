"""The gRPC server: giving up, streams, the repository, probes, who may come in, and what strangers send."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rpc_client import SERVICE, Client, Code, M, X, models_of_every_kind, serving, simple, twice, with_parameter
from shelf import DOUBLE, FakeServed, FakeShelf, double

from accelerando.errors import (
    BundleError,
    UsageError,
)
from accelerando.server.access import Settings
from accelerando.server.rpc import Tls
from accelerando.server.traffic import Traffic


@pytest.fixture(scope="module")
def models() -> FakeShelf:
    return models_of_every_kind()


@pytest.fixture(scope="module")
def client(models: FakeShelf) -> Iterator[Client]:
    with serving(models) as client:
        yield client


# --- giving up --------------------------------------------------------------------------------------------------


def settled(future: Future[Any]) -> bool:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    return done.wait(20)


@contextmanager
def holding() -> Iterator[tuple[FakeServed, Client]]:
    held = FakeServed(DOUBLE, double, answers="held")
    with serving(FakeShelf({"double": held})) as client:
        yield held, client


def first_ticket(held: FakeServed) -> Any:
    for _ in range(2000):
        if held.tickets:
            return held.tickets[0]
        time.sleep(0.005)
    raise AssertionError("no request came")


def test_a_client_that_cancels_leaves_the_queue() -> None:
    with holding() as (held, client):
        call = client.method("ModelInfer").future(twice(X), timeout=20)
        ticket = first_ticket(held)
        call.cancel()
        assert settled(ticket.future)
        assert ticket.future.cancelled()
        assert held.release() == 0


def test_a_client_that_hangs_up_leaves_the_queue() -> None:
    with holding() as (held, client):
        with grpc.insecure_channel(f"127.0.0.1:{client.port}") as other:
            call = Client(other).method("ModelInfer").future(twice(X))
            ticket = first_ticket(held)
        assert settled(ticket.future)
        assert ticket.future.cancelled()
        assert call.code() is Code.CANCELLED


def test_a_deadline_that_passes_leaves_the_queue() -> None:
    with holding() as (held, client):
        assert client.refused("ModelInfer", twice(X), timeout=0.2)[0] is Code.DEADLINE_EXCEEDED
        ticket = first_ticket(held)
        assert settled(ticket.future)
        assert ticket.future.cancelled()


def test_a_ticket_that_the_runtime_drops_is_unavailable() -> None:
    with holding() as (held, client):
        call = client.method("ModelInfer").future(twice(X), timeout=20)
        first_ticket(held).future.cancel()
        assert call.code() is Code.UNAVAILABLE


def nothing_until(end: threading.Event) -> Iterator[Any]:
    end.wait(20)
    yield from ()


def test_stopping_answers_what_was_accepted_and_takes_no_more() -> None:
    with holding() as (held, client):
        health = health_pb2_grpc.HealthStub(client.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="double"), timeout=20)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        end = threading.Event()
        idle = client.method("ModelStreamInfer")(nothing_until(end), timeout=20)
        call = client.method("ModelInfer").future(twice(X), timeout=20)
        first_ticket(held)
        stopped = client.stop(20.0)
        assert [state.status for state in watch] == [health_pb2.HealthCheckResponse.NOT_SERVING]
        assert idle.code() is Code.UNAVAILABLE
        assert client.refused("ModelInfer", twice(X))[0] in (Code.UNAVAILABLE, Code.CANCELLED)
        assert not stopped.done()
        assert held.release() == 1
        assert np.frombuffer(call.result().raw_output_contents[0], np.float32)[1] == 2.0
        stopped.result(10)
        end.set()


def test_what_was_sent_on_a_stream_before_the_end_is_answered() -> None:
    with holding() as (held, client):
        end = threading.Event()

        def asked() -> Iterator[Any]:
            yield from (twice(X) for _ in range(5))
            yield from nothing_until(end)

        answers = client.method("ModelStreamInfer")(asked(), timeout=20)
        first_ticket(held)
        stopped = client.stop(20.0)
        for _ in range(5):
            while not held.release():
                time.sleep(0.005)
            assert not next(answers).error_message
        with pytest.raises(grpc.RpcError, match="the server is stopping"):
            next(answers)
        stopped.result(10)
        end.set()


def test_answers_are_counted_by_their_status() -> None:
    traffic = Traffic()
    with serving(models_of_every_kind(), traffic=traffic) as client:
        client("ModelInfer", simple())
        client.refused("ModelInfer", simple(model_name="nobody"))
        list(client.method("ModelStreamInfer")(iter([simple(), b"\xff"]), timeout=20))
    assert traffic.answers == {
        ("grpc", "OK"): 2, ("grpc", "NOT_FOUND"): 1, ("grpc", "INVALID_ARGUMENT"): 1,
    }  # fmt: skip


def test_more_calls_than_are_taken_at_once() -> None:
    held = FakeServed(DOUBLE, double, answers="held")
    with serving(FakeShelf({"double": held}), most_calls=1) as client:
        call = client.method("ModelInfer").future(twice(X), timeout=20)
        first_ticket(held)
        code, words = client.refused("ServerMetadata")
        assert (code, "1 calls are under way" in words) == (Code.RESOURCE_EXHAUSTED, True)
        stream = client.method("ModelStreamInfer")(iter([twice(X)]), timeout=20)
        assert stream.code() is Code.RESOURCE_EXHAUSTED
        assert client("ServerLive").live, "a busy server is not a dead one"
        held.release()
        call.result()
        assert client("ServerMetadata").name


def test_more_watchers_than_there_may_be() -> None:
    with serving(FakeShelf({})) as client:
        health = health_pb2_grpc.HealthStub(client.channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(50)]
        assert all(next(watch).status == health_pb2.HealthCheckResponse.SERVING for watch in watches)
        assert health.Watch(health_pb2.HealthCheckRequest(), timeout=20).code() is Code.RESOURCE_EXHAUSTED
        for watch in watches:
            watch.cancel()


# --- streams ----------------------------------------------------------------------------------------------------


def test_a_stream_answers_in_turn_and_outlives_bad_requests(client: Client) -> None:
    good, bad, marked = simple(id="a"), simple(id="b", model_name="nobody"), simple(id="c")
    with_parameter(marked, "triton_enable_empty_final_response", True)
    answers = list(client.method("ModelStreamInfer")(iter([good, bad, b"\xff", marked, good]), timeout=20))
    assert [a.infer_response.id for a in answers] == ["a", "b", "", "c", "a"]
    assert [bool(a.error_message) for a in answers] == [False, True, True, False, False]
    assert "Request for unknown model" in answers[1].error_message
    assert np.frombuffer(answers[4].infer_response.raw_output_contents[0], np.int32)[1] == 2
    assert answers[3].infer_response.parameters["triton_final_response"].bool_param
    assert "triton_final_response" not in answers[0].infer_response.parameters


def test_a_stream_that_is_cancelled_leaves_the_queue() -> None:
    with holding() as (held, client):
        stream = client.method("ModelStreamInfer")(iter([twice(X)]), timeout=20)
        ticket = first_ticket(held)
        stream.cancel()
        assert settled(ticket.future)
        assert ticket.future.cancelled()


# --- the repository ---------------------------------------------------------------------------------------------


def test_index_load_and_unload() -> None:
    shelf = FakeShelf({"double": FakeServed(DOUBLE, double)}, out={"other": FakeServed()})
    with serving(shelf) as client:
        found = {m.name: (m.version, m.state, m.reason) for m in client("RepositoryIndex").models}
        assert found == {"double": ("1", "READY", ""), "other": ("1", "UNAVAILABLE", "not loaded")}
        ready = client("RepositoryIndex", M.RepositoryIndexRequest(ready=True)).models
        assert [m.name for m in ready] == ["double"]
        load = M.RepositoryModelLoadRequest(model_name="other")
        load.parameters["config"].string_param = "{}"
        client("RepositoryModelLoad", load)
        assert shelf.loads == [("other", {"config": "{}"})]
        client("ModelInfer", simple(model_name="other"))
        unload = M.RepositoryModelUnloadRequest(model_name="other")
        unload.parameters["unload_dependents"].bool_param = False
        client("RepositoryModelUnload", unload)
        assert client.refused("ModelInfer", simple(model_name="other"))[0] is Code.UNAVAILABLE


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BundleError("no-manifest", "there is no manifest.json"), Code.FAILED_PRECONDITION),
        (UsageError("the parameter 'config' is not offered"), Code.INVALID_ARGUMENT),
        (OSError("a secret of the server"), Code.INTERNAL),
    ],
)
def test_a_load_that_fails_says_why(error: Exception, code: Any) -> None:
    class Stubborn(FakeShelf):
        def load(self, name: str, parameters: Any = None) -> None:
            raise error

    with serving(Stubborn({"double": FakeServed(DOUBLE, double)})) as client:
        found, words = client.refused("RepositoryModelLoad", M.RepositoryModelLoadRequest(model_name="double"))
        assert found is code
        assert ("failed to load 'double'" in words) is (code is not Code.INTERNAL)
        assert "secret" not in words
        client("ModelInfer", twice(X))


def test_bad_requests_to_the_repository(client: Client) -> None:
    code, words = client.refused("RepositoryModelLoad", M.RepositoryModelLoadRequest(model_name="nobody"))
    assert code is Code.NOT_FOUND
    assert "failed to load 'nobody'" in words
    code, words = client.refused("RepositoryModelUnload", M.RepositoryModelUnloadRequest(model_name="nobody"))
    assert code is Code.NOT_FOUND
    unload = M.RepositoryModelUnloadRequest(model_name="simple")
    unload.parameters["gently"].bool_param = True
    assert client.refused("RepositoryModelUnload", unload)[0] is Code.INVALID_ARGUMENT
    for name, message in (
        ("RepositoryIndex", M.RepositoryIndexRequest),
        ("RepositoryModelLoad", M.RepositoryModelLoadRequest),
        ("RepositoryModelUnload", M.RepositoryModelUnloadRequest),
    ):
        assert client.refused(name, message(repository_name="elsewhere"))[0] is Code.INVALID_ARGUMENT


def test_others_are_answered_while_a_model_loads() -> None:
    loading, go_on = threading.Event(), threading.Event()

    class Slow(FakeShelf):
        def load(self, name: str, parameters: Any = None) -> None:
            loading.set()
            assert go_on.wait(20)

    with serving(Slow({"double": FakeServed(DOUBLE, double)})) as client:
        load = client.method("RepositoryModelLoad").future(M.RepositoryModelLoadRequest(model_name="double"))
        assert loading.wait(20)
        client("ModelInfer", twice(X))
        assert not load.done()
        go_on.set()
        load.result(20)


# --- health by gRPC's own protocol ------------------------------------------------------------------------------


def test_probes(client: Client) -> None:
    health = health_pb2_grpc.HealthStub(client.channel)
    serving_, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

    def state(service: str) -> Any:
        return health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20).status

    assert state("") == state(SERVICE) == state("simple") == serving_
    assert state("unloaded") == not_serving
    with pytest.raises(grpc.RpcError) as caught:
        state("nobody")
    assert caught.value.code() is Code.NOT_FOUND
    with pytest.raises(grpc.RpcError) as caught:
        client.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=20)
    assert caught.value.code() is Code.INVALID_ARGUMENT


def test_a_watch_sees_a_model_come_and_go() -> None:
    served = FakeServed(DOUBLE, double)
    shelf = FakeShelf({}, out={"double": served})
    with serving(shelf) as client:
        watch = health_pb2_grpc.HealthStub(client.channel).Watch(
            health_pb2.HealthCheckRequest(service="double"), timeout=20
        )
        kinds = health_pb2.HealthCheckResponse
        assert next(watch).status == kinds.NOT_SERVING
        shelf.load("double")
        assert next(watch).status == kinds.SERVING
        served.ready = False  # none of its rungs can run any longer
        assert next(watch).status == kinds.NOT_SERVING
        assert not client("ModelReady", M.ModelReadyRequest(name="double")).ready
        watch.cancel()


def test_a_shelf_that_is_not_ready() -> None:
    with serving(FakeShelf({}, ready=False)) as client:
        assert client("ServerLive").live
        assert not client("ServerReady").ready
        health = health_pb2_grpc.HealthStub(client.channel)
        state = health.Check(health_pb2.HealthCheckRequest(), timeout=20).status
        assert state == health_pb2.HealthCheckResponse.NOT_SERVING


# --- who may come in --------------------------------------------------------------------------------------------


def test_tokens(models: FakeShelf, tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\nfirst-token\n")
    file.chmod(0o600)
    with serving(models, Settings(tokens=file)) as client:
        assert client("ServerLive").live
        assert client("ServerReady").ready
        for metadata in (
            [],
            [("authorization", "Bearer wrong")],
            [("authorization", "first-token")],
            [("authorization", "Bearer ")],
        ):
            for method in ("ModelInfer", "ServerMetadata", "RepositoryModelUnload"):
                assert client.refused(method, metadata=metadata)[0] is Code.UNAUTHENTICATED
        stream = client.method("ModelStreamInfer")(iter([simple()]), timeout=20)
        assert stream.code() is Code.UNAUTHENTICATED
        client("ModelInfer", simple(), metadata=[("authorization", "Bearer first-token")])
        file.write_text("second-token\n")
        client("ModelInfer", simple(), metadata=[("authorization", "Bearer second-token")])
        first = [("authorization", "Bearer first-token")]
        assert client.refused("ModelInfer", simple(), metadata=first)[0] is Code.UNAUTHENTICATED


def test_a_port_that_is_taken(models: FakeShelf, client: Client) -> None:
    with pytest.raises(UsageError, match=str(client.port)), serving(models, port=client.port):
        pass


def test_settings_that_can_not_be(models: FakeShelf, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="brotli"), serving(models, compression="brotli"):
        pass
    nothing, noise = tmp_path / "nothing.pem", tmp_path / "noise.pem"
    noise.write_text("this is no certificate")
    with pytest.raises(UsageError, match=r"nothing\.pem"), serving(models, tls=Tls(noise, nothing)):
        pass
    with pytest.raises(UsageError, match="PEM"), serving(models, tls=Tls(noise, noise)):
        pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that has signed itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*line.split(), *files], check=True, capture_output=True, timeout=60)
    return certificate, key


def test_encryption(models: FakeShelf, pair: tuple[Path, Path]) -> None:
    certificate, key = pair
    known = grpc.ssl_channel_credentials(certificate.read_bytes())
    with serving(models, tls=Tls(certificate, key), keys=known) as client:
        assert client("ModelInfer", simple(id="secret")).id == "secret"
        with grpc.insecure_channel(f"127.0.0.1:{client.port}") as plain:
            assert Client(plain).refused("ServerLive")[0] is Code.UNAVAILABLE


def test_clients_need_a_certificate_where_that_is_asked(models: FakeShelf, pair: tuple[Path, Path]) -> None:
    certificate, key = pair
    own = grpc.ssl_channel_credentials(certificate.read_bytes(), key.read_bytes(), certificate.read_bytes())
    stranger = grpc.ssl_channel_credentials(certificate.read_bytes())
    with serving(models, tls=Tls(certificate, key, clients=certificate), keys=own) as client:
        assert client("ServerLive").live
        with grpc.secure_channel(f"127.0.0.1:{client.port}", stranger) as channel:
            assert Client(channel).refused("ServerLive")[0] is Code.UNAVAILABLE


# --- what strangers send ----------------------------------------------------------------------------------------


def test_whatever_is_sent_is_answered_as_bad_input(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    """2,000 mutated messages: none is an error of the server's, and it lives on."""
    rng = random.Random(0)
    seeds = [simple(id="x"), twice(X), with_parameter(twice(X), "timeout", 10**9)]
    typed = M.ModelInferRequest(model_name="words")
    typed.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"a")
    method = client.method("ModelInfer")
    seen: dict[Any, int] = {}
    with caplog.at_level(logging.WARNING, "accelerando"):
        for _ in range(40):
            sent = [mutated(rng, rng.choice([*seeds, typed])) for _ in range(50)]
            for call in [method.future(data, timeout=20) for data in sent]:
                code = call.code()
                seen[code] = seen.get(code, 0) + 1
    assert set(seen) == {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND}, seen
    assert min(seen.values()) > 50, "it takes all three ways"
    assert not caplog.records
    assert client("ModelInfer", simple(id="after")).id == "after"


def mutated(rng: random.Random, request: Any) -> bytes:
    """A message changed in a field, in its bytes, or nothing but noise."""
    copy = M.ModelInferRequest.FromString(request.SerializeToString())
    way = rng.randrange(9)
    if way == 0:
        return rng.randbytes(rng.randrange(200))
    tensor = copy.inputs[0]
    if way == 1:
        tensor.shape[:] = [rng.choice([-1, 0, 1, 2, 4, 16, 2**31, 2**63 - 1]) for _ in range(rng.randrange(5))]
    elif way == 2:
        tensor.datatype = rng.choice(["BOOL", "BF16", "FP16", "FP64", "BYTES", "UINT64", "INT8", "", "fp32"])
    elif way == 3:
        copy.raw_input_contents.extend(rng.randbytes(rng.randrange(80)) for _ in range(rng.randrange(3)))
    elif way == 4:
        name = rng.choice(["timeout", "priority", "min_quality", "binary_data_output", "sequence_id", ""])
        with_parameter(copy, name, rng.choice([True, -1, 1, 2**63 - 1, "a", float("inf"), -0.5]))
    elif way == 5:
        for name, value in (("int_contents", 7), ("fp32_contents", 1.0), ("bytes_contents", b"\xff")):
            if rng.random() < 0.5:
                getattr(tensor.contents, name).extend([value] * rng.randrange(20))
    elif way == 8:
        copy.model_name = rng.choice(["nobody", "double", ""])
    data = bytearray(copy.SerializeToString())
    if way == 6 or rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            change = rng.randrange(3)
            if change == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                del data[at : at + rng.randrange(1, 10)]
            else:
                data[at:at] = rng.randbytes(rng.randrange(1, 10))
            if not data:
                break
    return bytes(data)
