"""`accelerando serve` as a whole: a real process, real bundles, both protocols, from its start to its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from certificates import self_signed
from clients import programs_of
from test_isolation import linear

from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.recipe import Recipe
from accelerando.signature import Port
from accelerando.testing.bundles import SIGNATURE, write_bundle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[1]
ROW = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}]}
ANSWER = [18.0, 22.0, 26.0]
RECIPES = [Recipe((), Onnxruntime(threads=1)), Recipe((), Onnxruntime(threads=1, optimization="basic"))]


def bundle_at(path: Path) -> Path:
    write_bundle(path, recipes=RECIPES, content=linear(path.parent / f"{path.name}-model" / "model.onnx"))
    return path


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    grpc: str
    bundle: Path

    def ask(self, client: httpx.Client | None = None, **more: Any) -> httpx.Response:
        return (client or httpx).post(f"{self.url}/v2/models/lin/infer", json={**ROW, **more}, timeout=60)

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=60)[0]


def start(bundle: Path, *options: str) -> Running:
    command = [sys.executable, "-m", "accelerando.cli", "serve", f"lin={bundle}", "--port", "0", "--grpc-port", "0"]
    command = [sys.executable, "-c", "from accelerando.cli import main; main()", *command[3:]]
    process = subprocess.Popen(
        [*command, "--goal", "p99 <= 30s", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    guard = threading.Timer(60, process.kill)  # a server that never says where it is
    guard.start()
    lines = []
    while len(lines) < 2 and (line := process.stdout.readline()):
        lines.append(line.split()[-1])
    guard.cancel()
    if len(lines) < 2:
        raise AssertionError(process.communicate(timeout=30)[1])
    return Running(process, lines[0], lines[1], bundle)


def log_of(running: Running) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (running.bundle.parent / "log").read_text().splitlines()]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    found = start(bundle_at(tmp_path / "b"), "--log", str(tmp_path / "log"))
    yield found
    if found.process.poll() is None:
        found.process.kill()
    found.process.communicate(timeout=30)


def test_both_protocols_answer_and_the_server_ends_in_order(running: Running) -> None:
    grpc = pytest.importorskip("grpc")
    from accelerando.server.protocol import inference

    reply = running.ask(id="7")
    assert reply.status_code == 200, reply.text
    found = reply.json()
    assert found["id"] == "7"
    assert found["outputs"][0]["data"] == ANSWER
    assert found["parameters"]["rung"] in (0, 1)
    assert httpx.get(f"{running.url}/v2/health/ready").status_code == 200
    assert "accelerando_requests_total" in httpx.get(f"{running.url}/metrics").text
    assert httpx.get(f"{running.url}/").headers["content-type"].startswith("text/html")
    assert "openapi" in httpx.get(f"{running.url}/openapi.json").json()
    state = httpx.get(f"{running.url}/v2/dashboard/state").json()
    assert state["models"][0]["status"]["answered"] == 1

    messages = inference().messages
    with grpc.insecure_channel(running.grpc) as channel:
        request = messages.ModelInferRequest(model_name="lin", id="8")
        tensor = request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        tensor.contents.fp32_contents.extend([1, 1, 1, 1])
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = messages.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=60))
    assert answer.id == "8"
    running.stop()
    assert running.process.returncode == 0


def test_what_was_accepted_is_answered_when_it_is_told_to_end(running: Running) -> None:
    """A request of which half has come when SIGTERM comes: it is answered, and nobody else is let in."""
    host, port = running.url.removeprefix("http://").split(":")
    body = json.dumps(ROW).encode()
    lines = [
        "POST /v2/models/lin/infer HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        "connection: close",
    ]
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    with socket.create_connection((host, int(port)), timeout=60) as begun:
        begun.sendall(head.encode() + body[:20])
        assert running.ask().status_code == 200  # so the half has been read, too
        running.process.send_signal(signal.SIGTERM)
        for _ in range(600):
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("it still listens")
        begun.sendall(body[20:])
        reply = begun.makefile("rb").read()
    assert b" 200 " in reply.split(b"\r\n")[0]
    assert json.loads(reply.split(b"\r\n\r\n")[1])["outputs"][0]["data"] == ANSWER
    running.process.communicate(timeout=60)
    assert running.process.returncode == 0


def test_a_killed_worker_loses_nothing(running: Running) -> None:
    assert running.ask().status_code == 200
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    if not children.exists():
        pytest.skip("this system does not tell a process's children")
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    reply = running.ask()
    assert reply.status_code == 200, reply.text
    assert reply.json()["outputs"][0]["data"] == ANSWER
    assert 'accelerando_process_losses_total{model="lin"} 1.0' in httpx.get(f"{running.url}/metrics").text
    running.stop()
    (told,) = [line for line in log_of(running) if "was lost" in line["message"]]
    assert (told["bundle"], told["level"]) == (str(running.bundle), "warning")
    assert "SIGKILL" in told["reason"]


def test_a_new_bundle_takes_over_without_a_failed_request(running: Running, tmp_path: Path) -> None:
    statuses: list[tuple[int, str]] = []
    stop = threading.Event()

    def client() -> None:
        with httpx.Client() as session:
            while not stop.is_set():
                reply = running.ask(session)
                statuses.append((reply.status_code, reply.json().get("model_version", reply.text)))

    one = threading.Thread(target=client)
    one.start()
    newer = bundle_at(tmp_path / "newer")
    shutil.copyfile(newer / "manifest.json", running.bundle / "manifest.json.new")
    (running.bundle / "manifest.json.new").replace(running.bundle / "manifest.json")
    for _ in range(600):
        if statuses and statuses[-1][1] == "2":
            break
        time.sleep(0.1)
    stop.set()
    one.join()
    assert {status for status, _ in statuses} == {200}
    assert statuses[-1][1] == "2"


def test_a_damaged_bundle_does_not_take_over(running: Running) -> None:
    (running.bundle / "manifest.json").write_text("{}")
    reply = httpx.post(f"{running.url}/v2/repository/models/lin/load", json={}, timeout=60)
    assert reply.status_code == 400
    assert "[not-a-bundle]" in reply.json()["error"]
    assert running.ask().json()["outputs"][0]["data"] == ANSWER


def test_unload_and_load(running: Running) -> None:
    assert httpx.post(f"{running.url}/v2/repository/models/lin/unload", json={}, timeout=60).status_code == 200
    assert running.ask().status_code == 503
    assert httpx.post(f"{running.url}/v2/repository/models/lin/load", json={}, timeout=60).status_code == 200
    assert running.ask().status_code == 200


def test_the_goal_is_changed_by_the_door_that_the_dashboard_uses(running: Running) -> None:
    changed = httpx.put(f"{running.url}/v2/models/lin/goal", json={"goal": "speedup >= 3"})
    assert changed.status_code == 200, changed.text
    assert running.ask().json()["parameters"]["rung"] == 1
    wrong = httpx.put(f"{running.url}/v2/models/lin/goal", json={"goal": "quick"})
    assert wrong.status_code == 400


def test_the_log_is_lines_of_json(running: Running, tmp_path: Path) -> None:
    running.ask()
    running.stop()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert any(line["message"] == "loaded" and line["model"] == "lin" for line in lines)


def test_encryption_by_the_flags_is_of_both_protocols(tmp_path: Path) -> None:
    grpc = pytest.importorskip("grpc")
    certificate, key = self_signed(tmp_path)
    running = start(bundle_at(tmp_path / "b"), "--certificate", str(certificate), "--key", str(key))
    try:
        assert running.url.startswith("https://127.0.0.1:")
        with httpx.Client(verify=ssl.create_default_context(cafile=certificate)) as client:
            for _ in range(2):  # the second on the same connection
                reply = running.ask(client)
                assert reply.status_code == 200, reply.text
                assert reply.json()["outputs"][0]["data"] == ANSWER
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            running.ask()
        with pytest.raises(httpx.TransportError):
            httpx.get(running.url.replace("https", "http"), timeout=60)
        known = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(running.grpc, known) as channel:
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
            assert live(b"", timeout=60) == b"\x08\x01"  # live: true
    finally:
        running.stop()
    assert running.process.returncode == 0


def test_it_answers_to_its_own_names_and_to_those_that_are_allowed(tmp_path: Path) -> None:
    running = start(bundle_at(tmp_path / "b"), "--allow-host", "models.example", "--allow-host", "two.example")
    try:
        for host, status in [
            ("models.example", 200),
            ("two.example:80", 200),
            ("localhost", 200),
            ("evil.example", 403),
        ]:
            for reply in (
                httpx.get(f"{running.url}/v2", headers={"host": host}, timeout=60),
                httpx.post(f"{running.url}/v2/models/lin/infer", json=ROW, headers={"host": host}, timeout=60),
            ):
                assert reply.status_code == status, reply.text
                assert status == 200 or "not 'evil.example', but" in reply.json()["error"]
    finally:
        running.stop()


def test_a_slow_client_is_hung_up_on_and_too_many_are_told_so(tmp_path: Path) -> None:
    import asyncio

    from accelerando.serve.governed import govern
    from accelerando.server.run import Service, serve_all
    from accelerando.server.shelf import Shelf

    bundle = bundle_at(tmp_path / "b")
    shelf = Shelf({"lin": bundle}, lambda name, path: govern(path, goal="p99 <= 30s", audit=0, name=name))
    ports: list[int] = []

    async def scenario() -> tuple[bytes, bytes, bytes]:
        service = Service(port=0, most_connections=2, head_seconds=0.5)
        serving = asyncio.create_task(serve_all(shelf, service, lambda port, _: ports.append(port)))
        while not ports:
            await asyncio.sleep(0.01)
        slow, idle, third = [await asyncio.open_connection("127.0.0.1", ports[0]) for _ in range(3)]
        refused = await asyncio.wait_for(third[0].read(), 30)
        slow[1].write(b"GET /v2 HTTP/1.1\r\nhost: x\r\n")
        hung_up = await asyncio.wait_for(slow[0].read(), 30)
        assert await asyncio.wait_for(idle[0].read(), 30) == b""
        again = await asyncio.open_connection("127.0.0.1", ports[0])
        again[1].write(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\nGET /v2 HTTP/1.1\r\nhost")  # one and a half
        answered = await asyncio.wait_for(again[0].read(), 30)
        for _, writer in (slow, idle, third, again):
            writer.close()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 60)
        return refused, hung_up, answered

    refused, hung_up, answered = asyncio.run(scenario())
    shelf.close()
    assert b"503" in refused
    assert json.loads(refused.split(b"\r\n\r\n")[1])["error"]
    assert hung_up == b""
    assert answered.startswith(b"HTTP/1.1 200")
    assert answered.count(b"HTTP/1.1") == 1


def test_the_example_asks_a_served_model_by_tritonclient(tmp_path: Path) -> None:
    """`examples/serve_digits/call.py`, in the venv of the outside client, against a bundle of the digits' shape."""
    client = [str(programs_of("triton") / "python"), str(ROOT / "examples/serve_digits/call.py")]
    signature = replace(
        SIGNATURE,
        inputs=(Port("input", "float32", ("batch", 1, 8, 8)),),
        outputs=(Port("output", "float32", ("batch", 10)),),
        parameters=("input",),
        arguments={"input": {"leaf": 0}},
    )
    rows = [np.random.default_rng(0).random((4, 1, 8, 8), np.float32)]
    bundle = tmp_path / "digits"
    write_bundle(bundle, recipes=RECIPES, content=digits_like(tmp_path / "m"), signature=signature, inputs=rows)
    running = start(bundle)
    try:
        address = running.url.removeprefix("http://")
        done = subprocess.run([*client, address, "lin"], capture_output=True, text=True, timeout=120)
    finally:
        running.stop()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "3"
    assert "'rung'" in done.stdout


def digits_like(folder: Path) -> Path:
    """(n, 1, 8, 8) -> (n, 10), where place 3 is always the greatest for rows that are not empty."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.zeros((64, 10), np.float32)
    weights[:, 3] = 1.0
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["output"])],
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "w")],
    )
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--goal", "quick"], "quick"),
        (["--certificate", "nowhere.pem"], "both --certificate and --key"),
        (["--tokens", "nowhere"], "there is no file nowhere"),
        (["--max-body", "lots"], "--max-body must be"),
        (["--max-body", "2GiB"], "at most 2,147,483,647 bytes"),
        (["--host", ""], "--host is empty"),
        (["--log", "."], "can't be written"),
        (["--governor", "nervous"], "steady, balanced"),
        (["--port", "99999"], "--port must be from 0 (any that is free) to 65535, but is 99999"),
        (["--grpc-port", "99999"], "to 65535, or -1 for none, but is 99999"),
        (["--allow-host", "http://models.example"], "without scheme and port"),
        (["--certificate", __file__, "--key", __file__, "--grpc-port", "-1"], "a certificate and its key, as PEM"),
    ],
)
def test_a_mistake_is_told_before_anything_is_served(tmp_path: Path, options: list[str], message: str) -> None:
    bundle = bundle_at(tmp_path / "b")
    command = [
        sys.executable,
        "-c",
        "from accelerando.cli import main; main()",
        "serve",
        f"lin={bundle}",
        "--port",
        "0",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "serving" not in done.stdout
