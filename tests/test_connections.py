"""What a server says to who sends no end of a head, or no HTTP at all: over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from certificates import self_signed
from shelf import DOUBLE, FakeServed, FakeShelf, double

pytest.importorskip("uvicorn")
import uvicorn

from accelerando.server.connections import MOST_HEAD, protocol, that_fit

HEAD = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = 16 * 2**10
MOST_READ = 256 * 2**10  # that an event loop may read at a time: what came with the end of a head is not counted


class Echo:
    """An app that answers with the number of bytes of the body: at /held once it may, at /hasty without reading."""

    def __init__(self) -> None:
        self.may, self.came = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, scope["path"] != "/hasty"
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        self.came.set()
        if scope["path"] == "/held":
            await self.may.wait()
        text = b"%d bytes" % size
        length = (b"content-length", b"%d" % len(text))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": text})


@contextlib.asynccontextmanager
async def served(app: Any, **limits: float) -> AsyncIterator[int]:
    limits = {"head_seconds": 20.0, "idle_seconds": 20.0, "stall_seconds": 20.0, **limits}
    config = uvicorn.Config(
        app, http=protocol(10, **limits), ws="none", lifespan="off", log_config=None, access_log=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            await asyncio.sleep(0.005)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def told(port: int, *pieces: bytes) -> bytes:
    """What comes back until the server hangs up; nothing more is sent once anything has come."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = asyncio.create_task(everything(reader))
    try:
        for piece in pieces:
            if found.done():
                break
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)
        return await asyncio.wait_for(found, 20)
    finally:
        writer.close()


async def everything(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while piece := await reader.read(4096):
        found += piece
    return found


def run(scenario: Coroutine[Any, Any, Any]) -> Any:
    """In the event loop that `accelerando serve` has."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(scenario)
    return uvloop.run(scenario)


def asked(*pieces: bytes) -> bytes:
    async def scenario() -> bytes:
        async with served(Echo()) as port:
            return await told(port, *pieces)

    return run(scenario())


def status_and_error(reply: bytes) -> tuple[int, str]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert f"content-length: {len(body)}".encode() in head
    found = json.loads(body)
    assert found.keys() == {"error"}
    return int(head.split()[1]), found["error"]


def answers(replies: bytes) -> list[tuple[int, bytes]]:
    """The status and the body of each."""
    found = []
    while replies:
        head, _, rest = replies.partition(b"\r\n\r\n")
        length = int(head.split(b"content-length: ")[1].split()[0])
        found.append((int(head.split()[1]), rest[:length]))
        replies = rest[length:]
    return found


@pytest.mark.parametrize(
    "begun",
    [
        HEAD + b"endless: ",
        b"GET /",
        b"\r\n",
        POST + b"5\r\nhello\r\n0\r\nendless: ",
        POST + b"5;endless=",
    ],
    ids=["header", "path", "nothing", "trailer", "extension"],
)
def test_what_has_no_end_is_refused_at_64_kib(begun: bytes) -> None:
    pieces = 2 * MOST_READ // PIECE
    filler = (b"\r\n" if begun == b"\r\n" else b"aa") * (PIECE // 2)
    status, error = status_and_error(asked(begun, *[filler] * pieces))
    assert status == 431
    assert str(MOST_HEAD) in error


@pytest.mark.parametrize("size", [70_000, 250_000])
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["endless", "whole"])
@pytest.mark.parametrize("begun", [b"GET /", HEAD + b"x: "], ids=["path", "header"])
def test_a_head_above_64_kib_is_refused_whether_it_ends_or_not(begun: bytes, end: bytes, size: int) -> None:
    after = b" HTTP/1.1\r\nhost: x" if end and begun == b"GET /" else b""
    status, error = status_and_error(asked(begun + b"a" * size + after + end))
    assert status == 431
    assert str(MOST_HEAD) in error


def test_a_long_head_behind_another_request_is_refused_as_well() -> None:
    reply = asked(HEAD + b"\r\n" + HEAD + b"x: " + b"a" * 100_000, b"\r\n\r\n")
    assert [status for status, _ in answers(reply)] in ([200, 431], [200])  # where the first was owed, in silence


def test_many_small_headers_are_too_many_as_well() -> None:
    line = b"x: " + b"a" * 1019 + b"\r\n"
    assert status_and_error(asked(HEAD, *[line * 16] * 32))[0] == 431


def test_a_head_of_many_pieces_and_a_large_body_are_taken() -> None:
    head = HEAD.replace(b"GET", b"POST") + b"connection: close\r\ncontent-length: 3000000\r\n"
    headers = [b"x: " + b"a" * 1019 + b"\r\n"] * 48
    reply = asked(head, *headers, b"\r\n", *[b"b" * 100_000] * 30)
    assert reply.startswith(b"HTTP/1.1 200")
    assert reply.endswith(b"3000000 bytes")


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\nhost: x\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        POST + b"not a length\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["words", "tls", "version", "lengths", "chunk", "url", "tunnel"],
)
def test_what_is_not_http_is_told_so_in_json(sent: bytes) -> None:
    status, error = status_and_error(asked(sent))
    assert status == 400
    assert "HTTP/1.1" in error


UNREADABLE = [b"hello\r\n\r\n", b"GET http://[ HTTP/1.1\r\nhost: x\r\n\r\n", POST + b"not a length\r\n"]


@pytest.mark.parametrize("then", UNREADABLE, ids=["words", "url", "chunk"])
def test_what_is_owed_is_answered_before_a_refusal_which_is_never_taken_for_that_answer(then: bytes) -> None:
    async def scenario() -> bytes:
        app = Echo()
        async with served(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /held HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.wait_for(app.came.wait(), 20)
            writer.write(then)
            await asyncio.sleep(0.1)
            app.may.set()
            found = await asyncio.wait_for(everything(reader), 20)
            writer.close()
            return found

    assert answers(run(scenario())) == [(200, b"0 bytes")]


def test_a_body_that_is_longer_than_was_said_is_answered_and_then_hung_up_on() -> None:
    reply = asked(HEAD.replace(b"GET", b"POST") + b"content-length: 5\r\n\r\nhelloxx")
    assert answers(reply) == [(200, b"5 bytes")]
    assert b"connection: close" in reply


def test_who_pipelines_and_leaves_is_noticed_by_all_of_their_requests(caplog: pytest.LogCaptureFixture) -> None:
    left: list[str] = []

    async def until_left(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def scenario() -> None:
        async with served(until_left) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /one HTTP/1.1\r\nhost: x\r\n\r\nGET /two HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0.1)
            writer.close()
            for _ in range(1000):
                if left:
                    break
                await asyncio.sleep(0.005)

    with caplog.at_level(logging.WARNING):
        run(scenario())
    assert left == ["/one"]  # the other had not begun
    assert not caplog.records


HASTY = b"GET /hasty HTTP/1.1\r\nhost: x\r\n"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (HASTY + b"\r\n", b""),
        (HASTY + b"\r\n", b"\r\n"),
        (HASTY + b"\r\n", HEAD),
        (HASTY + b"\r\n" + HEAD, b"x"),
        (HASTY + b"content-length: 100\r\n\r\n", b"x"),
        (HASTY.replace(b"GET", b"POST") + b"content-length: 1000000000000\r\n\r\n", b"x"),
        (HASTY.replace(b"GET", b"POST") + b"transfer-encoding: chunked\r\n\r\n", b"5\r\nhe"),
    ],
    ids=["nothing", "line", "head", "half", "body", "long body", "chunk"],
)
def test_whatever_comes_after_an_answer_holds_no_connection_for_ever(first: bytes, then: bytes) -> None:
    async def scenario() -> bytes:
        async with served(Echo(), head_seconds=0.2, idle_seconds=0.2) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first)
            found = await asyncio.wait_for(reader.readuntil(b"bytes"), 20)
            writer.write(then)
            found += await asyncio.wait_for(everything(reader), 20)
            writer.close()
            return found

    assert answers(run(scenario())) == [(200, b"0 bytes")]


def test_a_body_that_comes_after_its_answer_leaves_the_connection_of_use() -> None:
    async def scenario() -> bytes:
        async with served(Echo()) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HASTY + b"content-length: 5\r\n\r\n")
            found = await asyncio.wait_for(reader.readuntil(b"bytes"), 20)
            writer.write(b"hello" + HEAD + b"connection: close\r\n\r\n")
            found += await asyncio.wait_for(everything(reader), 20)
            writer.close()
            return found

    assert answers(run(scenario())) == [(200, b"0 bytes")] * 2


def test_an_answer_that_takes_longer_than_a_connection_may_idle_is_given() -> None:
    async def scenario() -> bytes:
        app = Echo()
        async with served(app, head_seconds=0.1, idle_seconds=0.1) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /held HTTP/1.1\r\nhost: x\r\n\r\n")
            await asyncio.sleep(0.5)
            app.may.set()
            found = await asyncio.wait_for(everything(reader), 20)
            writer.close()
            return found

    assert answers(run(scenario())) == [(200, b"0 bytes")]


LARGE = 32 * 2**20  # bytes, more than the system itself holds for a client that does not read


async def large(scope: Any, receive: Any, send: Any) -> None:
    length = (b"content-length", b"%d" % LARGE)
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": bytes(LARGE)})


@pytest.mark.parametrize("line", [b"", b"connection: close\r\n"], ids=["open", "closing"])
def test_who_does_not_read_is_dropped(line: bytes) -> None:
    async def scenario() -> int:
        async with served(large, stall_seconds=0.4) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + line + b"\r\n")
            await asyncio.sleep(1.5)
            found = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := await asyncio.wait_for(reader.read(2**20), 20):
                    found += len(piece)
            writer.close()
            return found

    assert run(scenario()) < LARGE


def test_who_reads_slowly_gets_all_of_it() -> None:
    async def scenario() -> int:
        async with served(large, stall_seconds=0.8, idle_seconds=0.2) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"\r\n")
            found = 0
            while piece := await asyncio.wait_for(reader.read(2**20), 20):
                found += len(piece)
                await asyncio.sleep(0.02)
            writer.close()
            return found

    assert run(scenario()) > LARGE


H2C = (
    b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
)
SENT = H2C + b"Content-Length: 5\r\n\r\nhello" + H2C + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n0\r\n\r\n"
SENT += b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
SENT += HEAD + b"connection: close\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 50, len(SENT)])
def test_the_wish_for_another_protocol_is_ignored(size: int, caplog: pytest.LogCaptureFixture) -> None:
    pieces = [SENT[start : start + size] for start in range(0, len(SENT), size)]
    with caplog.at_level(logging.WARNING):
        replies = asked(*pieces)
    assert answers(replies) == [(200, b"5 bytes"), (200, b"2 bytes"), (200, b"0 bytes"), (200, b"0 bytes")]
    assert not caplog.records


# --- the server as a whole ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def whole(**service: Any) -> AsyncIterator[tuple[int, int | None]]:
    """Both protocols over models that are fakes, and their ports."""
    from accelerando.server.run import Service, serve_all

    class Shelf(FakeShelf):
        def drain(self) -> None: ...

    started: asyncio.Future[tuple[int, int | None]] = asyncio.get_running_loop().create_future()
    shelf: Any = Shelf({"double": FakeServed(DOUBLE, double)})
    serving = asyncio.create_task(
        serve_all(shelf, Service(port=0, **service), lambda *ports: started.set_result(ports))
    )
    try:
        yield await asyncio.wait_for(started, 20)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 20)


def test_who_connects_and_begins_no_handshake_is_hung_up_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("grpc")
    from accelerando.server.rpc import Tls

    certificate, key = self_signed(tmp_path)

    async def scenario() -> tuple[bytes, bytes]:
        async with whole(tls=Tls(certificate, key), head_seconds=2.0) as (port, _):
            silent, quiet = await asyncio.open_connection("127.0.0.1", port)
            known = ssl.create_default_context(cafile=certificate)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=known)
            writer.write(b"GET /v2 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            found = await asyncio.wait_for(reader.read(), 20), await asyncio.wait_for(silent.read(), 20)
            writer.close()
            quiet.close()
            return found

    with caplog.at_level(logging.WARNING):
        answered, silence = run(scenario())
    assert answered.startswith(b"HTTP/1.1 200")
    assert silence == b""
    assert not caplog.records


def test_grpc_takes_no_more_connections_than_it_may() -> None:
    pytest.importorskip("grpc")

    async def scenario() -> list[bytes]:
        async with whole(grpc_port=0, most_connections=2) as (_, port):
            found = []
            clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            for reader, _ in clients:
                found.append(await asyncio.wait_for(reader.read(1), 20))
            for _, writer in clients:
                writer.close()
            return found

    assert sorted(run(scenario())) == [b"", b"\0", b"\0"]  # a server's settings begin so


@pytest.mark.parametrize(("hard", "fit"), [(1_000_000, (1000, 1000)), (1100, (500, 500)), (-1, (1000, 1000))])
def test_no_more_connections_are_taken_than_there_may_be_open_files(
    hard: int, fit: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    raised: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits))
    assert that_fit(1000, 1000) == fit
    assert raised == [(hard if hard > 0 else 2100, hard)]
    assert ("ulimit -n" in caplog.text) == (fit != (1000, 1000))
