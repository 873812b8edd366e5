"""The REST app against strangers: mutated requests, its own OpenAPI document, a real socket, schemathesis."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from caller import Caller, Got, call, run
from chromium import Chromium
from clients import programs_of
from shelf import DOUBLE, FakeServed, FakeShelf, signature_of

from accelerando.server.access import Access, Settings, names_of
from accelerando.server.dashboard import Dashboard
from accelerando.server.exchange import App
from accelerando.server.openapi import docs_page, example_request
from accelerando.server.rest import Rest
from accelerando.server.run import Front
from accelerando.server.traffic import Traffic

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, -0.0, "", "a", "INPUT0", "FP16", "FP64", "BYTES",
    "\ud800", "\x00", [], {}, [[]], [None], [[[]]], {"a": 1}, [1, [2]], [1e39], ["1"], [2**70], [[1] * 16], [0] * 16,
    {"binary_data_size": 64}, {"binary_data": True}, {"timeout": 0}, {"timeout": 10**7}, {"min_quality": 1e400},
    "x" * 5000,
]  # fmt: skip
HEADERS = {
    "Inference-Header-Content-Length": ["0", "1", "64", "200", "100000", "-1", "x", "", "1 ", "٣", "9" * 40],
    "Content-Encoding": ["gzip", "deflate", "br", "identity", "gzip, deflate", ""],
    "Accept-Encoding": ["gzip", "deflate", "*", ";;;,,,q=", "gzip;q=0"],
    "Content-Type": ["text/html", "application/json", "", ";", "application/octet-stream"],
    "Content-Length": ["0", "7", "x", "-1", "99999999999999999999"],
}
FINE = {200, 400, 404, 405, 413, 415}
TEXTS = signature_of({"text": ("object", ("batch", 1))}, {"text": ("object", ("batch", 1))})


def halve(leaves: list[Any]) -> list[Any]:
    """Finite for all that is finite, so that no answer fails that was asked rightly."""
    with np.errstate(invalid="ignore"):  # of NaN that signals
        return [leaves[0] / np.float32(2)]


def wild_app() -> Rest:
    models = {"simple": FakeServed(), "half": FakeServed(DOUBLE, halve), "echo": FakeServed(TEXTS, lambda x: x)}
    return Rest(FakeShelf(models), Settings(compress_from=200, max_body_bytes=50_000, max_json_bytes=40_000))


def mutated(value: Any, dice: random.Random) -> Any:
    """The value with one part of it replaced, dropped or doubled."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        way = dice.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            return {**value, dice.choice(["parameters", "outputs", "id", "data", "extra"]): dice.choice(JUNK)}
        return {**value, key: mutated(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        way = dice.random()
        if way < 0.1:
            return value[:at]
        if way < 0.2:
            return [*value, value[at]]
        return [*value[:at], mutated(value[at], dice), *value[at + 1 :]]
    return dice.choice(JUNK)


def wild(dice: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A request that began as a good one."""
    name, datatype, inputs, shape = dice.choice(
        [
            ("simple", "INT32", ["INPUT0", "INPUT1"], [1, 16]),
            ("half", "FP32", ["x"], [2, 4]),
            ("echo", "BYTES", ["text"], [2, 1]),
        ]
    )
    binary, count = dice.random() < 0.5, shape[0] * shape[1]
    raw = b"\x02\x00\x00\x00ab" * count if datatype == "BYTES" else bytes(dice.randrange(256) for _ in range(4 * count))
    part: dict[str, Any] = {"parameters": {"binary_data_size": len(raw)}}
    plain = {"data": ["ab" if datatype == "BYTES" else 1] * count}
    body: Any = {
        "id": "1",
        "inputs": [{"name": n, "datatype": datatype, "shape": shape, **(part if binary else plain)} for n in inputs],
        "parameters": {"binary_data_output": dice.random() < 0.5, "priority": 1},
    }
    for _ in range(dice.choice([0, 0, 1, 1, 1, 3])):
        body = mutated(body, dice)
    head = json.dumps(body).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if binary else {}
    data = head + raw * len(inputs) if binary else head
    if dice.random() < 0.2:
        cut = bytearray(data)
        for _ in range(dice.choice([1, 3, 20])):
            at = dice.randrange(len(cut)) if cut else 0
            cut[at : at + dice.choice([0, 1, 1, 1, 9])] = bytes([dice.randrange(256)] * dice.choice([0, 1, 1, 5]))
        data = bytes(cut)
    for header, values in HEADERS.items():
        if dice.random() < 0.04:
            headers[header] = dice.choice(values).encode().decode("latin-1")
    version = dice.choice(["", "", "", "/versions/1", "/versions/2", "/versions/\x00"])
    verb = dice.choice(["POST"] * 20 + ["GET", "PUT"])
    last = dice.choice(["infer"] * 20 + ["", "config", "goal", "\ud800", "ready"])
    return verb, f"/v2/models/{name}{version}/{last}", data, headers


def storm(count: int, seed: int) -> Counter[int]:
    """How many of this many wild requests were answered with which status; every answer is checked."""
    dice, app, seen = random.Random(seed), wild_app(), Counter[int]()

    async def all_of_them() -> None:
        for _ in range(count):
            sent = wild(dice)
            got = await Caller(app).call(*sent)
            assert got.status in FINE, (sent, got)
            assert got.status == 200 or got.error, (sent, got)
            seen[got.status] += 1

    run(all_of_them())
    return seen


def test_no_mutated_request_is_answered_with_a_fault_of_the_server() -> None:
    seen = storm(4000, seed=0)
    assert seen[200] > 400  # the mutations leave some good
    assert seen[400] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_hundred_thousand_mutated_requests(seed: int) -> None:
    assert sum(storm(25_000, seed).values()) == 25_000


def test_the_storm_would_notice_a_fault() -> None:
    """Sabotage: a server that trusts a shape."""

    async def trusting(scope: Any, receive: Any, send: Any) -> None:
        app = wild_app()
        app.shelf.find("simple").function = lambda leaves: 1 / 0  # type: ignore[attr-defined]
        await app(scope, receive, send)

    async def hit() -> None:
        dice = random.Random(0)
        assert any([(await Caller(trusting).call(*wild(dice))).status not in FINE for _ in range(200)])

    run(hit())


# --- the document -----------------------------------------------------------------------------------------------


def described(app: App) -> dict[str, Any]:
    return call(app, "GET", "/openapi.json").json


def app_with_pages() -> App:
    shelf: Any = FakeShelf({"simple": FakeServed()})
    return Front(Rest(shelf, pages=True), shelf, Dashboard(shelf), None, Traffic())


@pytest.mark.parametrize("pages", [False, True])
def test_the_document_lists_what_the_server_answers_and_nothing_else(pages: bool) -> None:
    app = app_with_pages() if pages else wild_app()
    about = described(app)
    assert about["openapi"] == "3.1.0"
    assert ("/metrics" in about["paths"]) == pages
    for path, methods in about["paths"].items():
        real = path.replace("{model}", "simple").replace("{version}", "1")
        allowed = call(app, "BREW", real)
        assert allowed.status == 405, path
        offered = {m.lower() for m in allowed.headers["allow"].split(", ")} - {"head"}
        assert offered == methods.keys() - {"parameters"}, path


def test_every_reference_in_the_document_leads_somewhere() -> None:
    about = described(wild_app())
    text = json.dumps(about)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names
    assert names <= about["components"]["schemas"].keys()


def test_pages_and_tokens_are_in_the_document_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("a\n")
    about = described(Rest(FakeShelf({}), Settings(tokens=tmp_path / "tokens"), pages=True))
    assert {"/", "/metrics", "/docs", "/openapi.json"} <= about["paths"].keys()
    assert about["security"] == [{"token": []}]
    assert "401" in about["paths"]["/v2"]["get"]["responses"]
    for path in ("/v2/health/live", "/", "/docs"):
        assert about["paths"][path]["get"]["security"] == []
        assert "401" not in about["paths"][path]["get"]["responses"]


def is_as_described(got: Got, about: dict[str, Any], responses: dict[str, Any]) -> bool:
    """Whether an error is named in the document, and of the form that stands there."""
    (content,) = responses[str(got.status)]["content"].items()
    schema = about["components"]["schemas"][content[1]["schema"]["$ref"].rpartition("/")[2]]
    kinds = {name: type_of["type"] for name, type_of in schema["properties"].items()}
    assert (kinds, schema["required"], schema["additionalProperties"]) == ({"error": "string"}, ["error"], False)
    return got.headers["content-type"] == content[0] and got.json.keys() == {"error"} and bool(got.error)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("guarded", [False, True])
def test_the_document_says_where_somebody_may_be_turned_away_and_nowhere_else(
    tmp_path: Path, guarded: bool, named: bool
) -> None:
    (tmp_path / "tokens").write_text("a\n")
    (tmp_path / "tokens").chmod(0o600)
    settings = Settings(tokens=tmp_path / "tokens" if guarded else None, hosts=names_of("127.0.0.1") if named else None)
    app = Access(Rest(FakeShelf({"simple": FakeServed()}), settings), settings)
    about = call(app, "GET", "/openapi.json", b"", {"Authorization": "Bearer a"}).json
    operations = [
        (method.upper(), path.replace("{model}", "simple").replace("{version}", "1"), methods[method]["responses"])
        for path, methods in about["paths"].items() for method in methods.keys() - {"parameters"}
    ]  # fmt: skip
    given = [
        {"Host": "evil.example"}, {"Host": "evil.example", "Authorization": "Bearer a"}, {"Host": "localhost"},
        {"Host": "localhost", "Origin": "https://evil.example", "Authorization": "Bearer a"},
    ]  # fmt: skip
    seen: dict[tuple[str, str], set[int]] = {(method, path): set() for method, path, _ in operations}
    for content in ("a\n", "# nobody\n"):
        (tmp_path / "tokens").write_text(content)
        for method, path, responses in operations:
            for got in (call(app, method, path, b"", headers) for headers in given):
                if got.status in (401, 403):
                    seen[method, path].add(got.status)
                    assert is_as_described(got, about, responses), (method, path, got)
    for method, path, responses in operations:
        assert seen[method, path] == {int(code) for code in responses} & {401, 403}, (method, path)
    assert {403} <= seen["POST", "/v2/models/simple/infer"]
    assert (403 in seen["GET", "/v2/health/live"]) == named


def test_the_example_in_the_document_is_a_request_that_works() -> None:
    app = wild_app()
    infer = described(app)["paths"]["/v2/models/{model}/infer"]
    example = infer["post"]["requestBody"]["content"]["application/json"]["example"]
    path = f"/v2/models/{infer['parameters'][0]['example']}/infer"
    assert call(app, "POST", path, json.dumps(example).encode()).status == 200


def test_a_model_whose_example_would_be_too_long_has_none() -> None:
    large = signature_of({"x": ("float32", ("batch", 3, 224, 224))}, {"y": ("float32", ("batch", 1))})
    assert example_request(large) is None
    infer = described(Rest(FakeShelf({"m": FakeServed(large)})))["paths"]["/v2/models/{model}/infer"]["post"]
    assert "example" not in infer["requestBody"]["content"]["application/json"]


def test_the_page_is_whole_in_itself() -> None:
    got = call(wild_app(), "GET", "/docs")
    assert got.status == 200
    assert got.body == docs_page()
    assert got.headers["content-security-policy"].startswith("default-src 'none'")
    page = got.body.decode()
    assert "http://" not in page
    assert "https://" not in page
    assert " src=" not in page


in_chromium = pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium on this machine")


@in_chromium
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_the_page_shows_every_route(tmp_path: Path, width: int, dark: bool) -> None:
    app = wild_app()
    routes = sum(len(methods.keys() - {"parameters"}) for methods in described(app)["paths"].values())
    with serving(app) as port, Chromium(tmp_path) as browser:
        page = browser.open(f"http://127.0.0.1:{port}/docs", width=width, dark=dark)
        page.until("document.querySelectorAll('details').length")
        assert page.value("document.querySelectorAll('details').length") == routes
        page.value("document.querySelectorAll('details').forEach(box => { box.open = true; })")
        assert "binary_data_output?: boolean" in page.text("main")
        assert page.value("document.documentElement.scrollWidth") <= width  # nothing sticks out
        background = page.value("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 28)" if dark else "rgb(255, 255, 255)")
        assert page.complaints == []
        assert {url.startswith(f"http://127.0.0.1:{port}/") for url in page.asked} == {True}


@in_chromium
@pytest.mark.slow
def test_the_page_asks_for_a_token(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("sesame\n")
    (tmp_path / "tokens").chmod(0o600)
    settings = Settings(tokens=tmp_path / "tokens")
    app = Access(Rest(FakeShelf({"simple": FakeServed()}), settings), settings)
    with serving(app) as port, Chromium(tmp_path) as browser:
        page = browser.open(f"http://127.0.0.1:{port}/docs")
        for word in ("wrong", "sesame"):
            page.until("!document.getElementById('ask').hidden")
            page.type("#token", word)
            page.value("document.getElementById('ask').requestSubmit()")
        page.until("document.querySelectorAll('details').length")
        assert page.value("document.getElementById('ask').hidden")


# --- a real socket ----------------------------------------------------------------------------------------------


@contextmanager
def serving(app: App) -> Iterator[int]:
    """The app under uvicorn on the loopback, on a port of its own."""
    uvicorn = pytest.importorskip("uvicorn")
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none")
    server = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        until(lambda: server.started)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def post(body: bytes, *lines: str, path: str = "/v2/models/simple/infer") -> bytes:
    head = "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""])
    return head.encode() + body


def talk(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(data)
        found = b""
        while piece := line.recv(65536):
            found += piece
    return found


def good_body() -> bytes:
    return json.dumps(example_request(FakeServed().signature)).encode()


def test_over_a_real_socket(tmp_path: Path) -> None:
    held = FakeServed(answers="held")
    models = {"simple": FakeServed(answers="thread"), "held": held}
    settings = Settings(max_json_bytes=2000, body_seconds=0.2)
    body = good_body()
    size, close = f"Content-Length: {len(body)}", "Connection: close"
    with serving(Access(Rest(FakeShelf(models), settings), settings)) as port:
        assert b" 200 " in talk(port, post(body, size, close))
        assert b"OUTPUT1" in talk(port, post(body, size) + post(body, size, close))  # one after the other
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        assert b" 200 " in talk(port, post(chunked, "Transfer-Encoding: chunked", close))
        assert b" 413 " in talk(port, post(b"", "Content-Length: 3000", close))
        assert b" 413 " in talk(port, post(b"fff\r\n" + b" " * 4095 + b"\r\n", "Transfer-Encoding: chunked", close))
        slow = talk(port, post(body[:-1], size))  # it waits for the last byte, and then the server closes
        assert b" 408 " in slow
        assert b"0.2 seconds" in slow
        with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
            line.sendall(post(body, size, path="/v2/models/held/infer"))
            until(lambda: held.tickets)
        until(lambda: held.tickets[0].future.cancelled())  # its client has gone away
        assert b" 200 " in talk(port, post(body, size, close))


def test_a_foreign_name_is_turned_away_over_a_real_socket_as_the_document_says() -> None:
    settings = Settings(hosts=names_of("127.0.0.1"))
    app = Access(Rest(FakeShelf({"simple": FakeServed()}), settings), settings)
    with serving(app) as port:

        def ask(path: str, host: str) -> Got:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            try:
                client.request("GET", path, headers={"Host": host})
                reply = client.getresponse()
                return Got(reply.status, dict(reply.getheaders()), reply.read())
            finally:
                client.close()

        about = ask("/openapi.json", f"localhost:{port}").json
        assert ask("/v2", f"127.0.0.1:{port}").status == 200
        turned_away = ask("/v2", f"evil.example:{port}")
    assert turned_away.status == 403
    assert is_as_described(turned_away, about, about["paths"]["/v2"]["get"]["responses"])
    assert "evil.example" in turned_away.error


class SteadyShelf(FakeShelf):
    """One whose models stay, so that the rest of a run has something to ask."""

    def unload(self, name: str) -> None:
        self.find(name)


@pytest.mark.slow
def test_with_schemathesis(tmp_path: Path) -> None:
    """It makes requests out of the document, good ones and bad ones, and holds the answers against it."""
    program = str(programs_of("schemathesis") / "schemathesis")
    app = Rest(SteadyShelf({"simple": FakeServed()}), Settings(max_body_bytes=2**20))
    with serving(app) as port:
        url = f"http://127.0.0.1:{port}"
        # What a model takes is more than a schema can say, so a request that fits the schema may still be refused.
        command = [
            program, "run", f"{url}/openapi.json", "--checks", "all", "--exclude-checks", "positive_data_acceptance",
            "--max-examples", "6", "--generation-deterministic", "--no-color",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
