"""What the dashboard's paths answer."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from dashboard_server import App
from recently import busy
from shelf import FakeServed, FakeShelf

from accelerando.server import dashboard
from accelerando.server.dashboard import STATE, STREAM, Dashboard

Reply = tuple[int, dict[bytes, bytes], bytes]


class Broken(FakeServed):
    def status(self) -> Any:
        raise RuntimeError("no status today")


def get(app: Any, path: str, method: str = "GET", headers: list[tuple[bytes, bytes]] | None = None) -> Reply:
    """One request, answered at once."""
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": headers or []}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


def test_the_page_and_its_files_are_there_and_nothing_else() -> None:
    app = Dashboard(FakeShelf({}))
    assert {"/", "/dashboard/page.js", "/dashboard/page.css", "/dashboard/uPlot.js"} < dashboard.assets().keys()
    for path in dashboard.assets():
        status, headers, body = get(app, path)
        assert status == 200
        assert app.takes(path)
        assert len(body) == int(headers[b"content-length"])
        assert b"default-src 'none'" in headers[b"content-security-policy"]
        assert get(app, path, "HEAD")[2] == b""
    for path in ("/dashboard/", "/dashboard/../metrics.py", "/dashboard/page.html", "/v2/dashboard"):
        assert not app.takes(path)
        assert get(app, path)[0] == 404
    assert get(app, "/", "POST")[0] == 405


def test_a_file_that_is_known_is_not_sent_again() -> None:
    app = Dashboard(FakeShelf({}))
    tag = get(app, "/")[1][b"etag"]
    for known in (tag, b'"other", W/' + tag):
        assert get(app, "/", headers=[(b"if-none-match", known)])[::2] == (304, b"")
    assert get(app, "/", headers=[(b"if-none-match", b'"other"')])[0] == 200


def test_nothing_is_loaded_from_elsewhere_and_no_text_becomes_html() -> None:
    texts = {p: a.body.decode() for p, a in dashboard.assets().items() if "uPlot" not in p}
    for path, text in texts.items():
        if path.endswith((".js", "/")):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", text), path
        assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[a-z0-9.-]+\.[a-z]{2,}", text), path
    assert "on" not in {m[:2] for m in re.findall(r"\s(\w+)=", texts["/"])}  # no handlers in the page
    assert "style=" not in texts["/"]


def test_the_chart_library_is_shipped_with_its_licence() -> None:
    assert "MIT" in dashboard.assets()["/dashboard/uPlot.LICENSE"].body.decode()
    assert b"uPlot (v1." in dashboard.assets()["/dashboard/uPlot.js"].body


def test_the_state_tells_of_every_model_as_finite_json() -> None:
    odd = busy("odd", slowdown=float("inf"), effective_quality=float("nan"))
    odd_served, broken = FakeServed(status=odd), Broken()
    shelf = FakeShelf({"odd": odd_served, "broken": broken}, out={"away": FakeServed()})
    shelf.reasons["odd"] = "it could not be loaded anew"
    app = Dashboard(shelf)
    status, headers, body = get(app, STATE)
    assert status == 200
    assert headers[b"cache-control"] == b"no-store"
    state = json.loads(body, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    away, ill, told = state["models"]
    assert (away["name"], away["state"], away["reason"]) == ("away", "UNAVAILABLE", "not loaded")
    assert (ill["state"], ill["reason"]) == ("UNAVAILABLE", "it did not tell its status: no status today")
    assert (told["state"], told["reason"]) == ("READY", "it could not be loaded anew")
    assert told["status"]["slowdown"] is None
    assert told["goal"]["bounds"][0] == {"text": "p99 <= 20ms", "quantity": "p99", "least": False, "value": 0.02}
    assert told["goal"]["needed"] == 0.99
    assert len(told["points"][0]) == len(state["columns"])


def test_the_history_is_kept_without_a_viewer_and_forgets_models_that_went() -> None:
    app = App("usual", history=60.0)
    (model,) = app.dashboard.state()["models"]
    assert len(model["points"]) >= 30
    assert model["recent"]["requests"] > 0
    assert app.dashboard.state(since=model["points"][-1][0])["models"][0]["points"] == []
    app.shelf.models.clear()
    assert app.dashboard.state()["models"] == []
    app.shelf.models["usual"] = {"1": FakeServed(status=busy("usual"))}
    assert len(app.dashboard.state()["models"][0]["points"]) == 1


def streamed(app: Dashboard, ends: str) -> tuple[list[bytes], bool]:
    """The bodies of a stream that ends in this way, and whether it came to an end by itself."""

    async def run() -> tuple[list[bytes], bool]:
        bodies: list[bytes] = []
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                bodies.append(message["body"])
            if len(bodies) == 2:
                if ends == "close":
                    app.close()
                elif ends == "disconnect":
                    gone.set()
                elif ends == "stall":
                    await asyncio.sleep(3600)

        scope = {"type": "http", "path": STREAM, "method": "GET", "headers": []}
        await asyncio.wait_for(app(scope, receive, send), 20)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        return bodies, not left

    return asyncio.run(run())


@pytest.mark.parametrize("ends", ["close", "disconnect", "stall"])
def test_a_stream_ends_with_its_viewer_and_with_the_server(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "STALLED", 0.05)
    app = Dashboard(FakeShelf({"digits": FakeServed(status=busy())}), pace=0.01)
    bodies, clean = streamed(app, ends)
    assert clean
    events = [json.loads(body.removeprefix(b"data: ")) for body in bodies[:2]]
    assert [len(event["models"][0]["points"]) for event in events] == [1, 0]  # what was told is not told again
    assert all(body.endswith(b"\n\n") for body in bodies)
    assert (bodies[-1] == b"event: end\ndata: {}\n\n") == (ends == "close")


def test_viewers_are_bounded_and_none_come_while_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Dashboard(FakeShelf({}))
    monkeypatch.setattr(dashboard, "VIEWERS", 0)
    assert get(app, STREAM)[0] == 503
    monkeypatch.undo()
    app.close()
    status, headers, body = get(app, STREAM)
    assert (status, headers[b"retry-after"]) == (503, b"5")
    assert json.loads(body) == {"error": "the server is closing"}


def test_watching_looks_at_once_and_ends_when_closed() -> None:
    app = Dashboard(FakeShelf({"digits": FakeServed(status=busy())}))

    async def run() -> None:
        watching = asyncio.create_task(app.watch())
        await asyncio.sleep(0)
        app.close()
        await asyncio.wait_for(watching, 10)

    asyncio.run(run())
    assert len(app.state()["models"][0]["points"]) == 1
