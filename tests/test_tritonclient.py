"""NVIDIA's tritonclient, as it comes from the registry and in a venv of its own, against both of our protocols."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from clients import programs_of
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from shelf import SIMPLE, FakeServed, FakeShelf, signature_of, sum_and_difference

from accelerando.errors import DeadlineError, OverloadedError, RowsError
from accelerando.server.access import Settings
from accelerando.server.protocol import inference
from accelerando.server.rest import Rest
from accelerando.server.rpc import serve_rpc

ROOT = Path(__file__).parents[1]
CALLS = ROOT / "tests" / "triton_calls.py"
STRINGS = signature_of(
    {"INPUT0": ("object", ("batch", 16)), "INPUT1": ("object", ("batch", 16))},
    {"OUTPUT0": ("object", ("batch", 16)), "OUTPUT1": ("object", ("batch", 16))},
)
KINDS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32")


def same(dtype: str) -> FakeServed:
    """x (batch, n) -> y, the same."""
    return FakeServed(signature_of({"x": (dtype, ("batch", "n"))}, {"y": (dtype, ("batch", "n"))}), list)


def sum_of_texts(leaves: list[Any]) -> list[Any]:
    numbers = [np.array([[int(text) for text in row] for row in leaf]) for leaf in leaves]
    return [np.array([[str(n) for n in row] for row in found], object) for found in sum_and_difference(numbers)]


def poisoned(leaves: list[Any]) -> list[Any]:
    raise RowsError("the model fails on row 0")


def models(function: Any = sum_and_difference) -> FakeShelf:
    """What `triton_calls.py` asks."""
    return FakeShelf(
        {
            "simple": FakeServed(SIMPLE, function),
            "simple_string": FakeServed(STRINGS, sum_of_texts),
            **{f"same_{kind}": same(kind) for kind in (*KINDS, "float64")},
            "same_text": same("object"),
            "silent": FakeServed(answers="held"),
            "busy": FakeServed(refusal=OverloadedError("the queue is full")),
            "late": FakeServed(refusal=DeadlineError("its deadline passed")),
            "poisoned": FakeServed(SIMPLE, poisoned),
        }
    )


@contextmanager
def serving(shelf: Any) -> Iterator[tuple[str, str]]:
    """Both servers in one event loop, as they run; the addresses of HTTP and gRPC."""
    settings = Settings(server_name="triton")
    ports: list[int] = []
    up, down = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = uvicorn.Config(Rest(shelf, settings), log_level="warning", http="httptools")
            web, rpc = uvicorn.Server(config), serve_rpc(shelf, settings, port=0)
            await rpc.start()
            task = asyncio.create_task(web.serve(sockets=[listener]))
            ports.extend((listener.getsockname()[1], rpc.port))
            up.set()
            await down.wait()
            web.should_exit = True
            await task
            await rpc.stop(5.0)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert up.wait(20)
        yield (f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the client's venv, which is made if it is not there."""
    return programs_of("triton") / "python"


def ask(python: Path, shelf: Any, file: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    description = folder / "inference.bin"
    description.write_bytes(file.SerializeToString())
    with serving(shelf) as addresses:
        command = [python, CALLS, *addresses, description]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_everything_that_tritonclient_can_ask(python: Path, tmp_path: Path) -> None:
    done = ask(python, models(), inference().file, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = re.findall(r"^def check_\w+\((kit)?", CALLS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(re.findall(r"^ok ", done.stdout, re.MULTILINE)) == len(asked) + asked.count("kit")


@pytest.mark.slow
def test_sabotage_a_server_that_errs_is_found_out(python: Path, tmp_path: Path) -> None:
    def wrong(leaves: list[Any]) -> list[Any]:
        total, difference = sum_and_difference(leaves)
        return [total, difference + np.int32(1)]

    file = FileDescriptorProto.FromString(inference().file.SerializeToString())
    next(m for m in file.message_type if m.name == "InferStatistics").field[3].number = 9
    done = ask(python, models(wrong), file, tmp_path)
    assert done.returncode > 5
    assert "the difference is wrong" in done.stdout
    assert "number of InferStatistics.compute_input" in done.stdout
    assert "ok check_health over grpc" in done.stdout
