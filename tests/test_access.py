from __future__ import annotations

import hmac
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from caller import Got, call, run
from shelf import FakeServed, FakeShelf

from accelerando.errors import UsageError
from accelerando.server.access import Access, Settings, Tokens, names_of
from accelerando.server.rest import Rest


def guarded(tokens: Path | None) -> Access:
    settings = Settings(tokens=tokens)
    return Access(Rest(FakeShelf({"simple": FakeServed()}), settings), settings)


def ask(app: Access, token: str | None = None, path: str = "/v2", **headers: str) -> Got:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return call(app, "GET", path, b"", given if token is None else {"Authorization": f"Bearer {token}", **given})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("# who may come in\nalpha\n\n  beta  \n")
    path.chmod(0o600)
    return path


def test_only_who_has_a_token_comes_in(file: Path) -> None:
    app = guarded(file)
    assert ask(app, "alpha").status == 200
    assert ask(app, "beta").status == 200
    for wrong in ("alph", "alphaa", "gamma", "", " ", "# who may come in", "ÿ"):
        got = ask(app, wrong)
        assert got.status == 401, wrong
        assert "www-authenticate" in got.headers
        assert "token" in got.error
    assert ask(app).status == 401
    for scheme in ("alpha", "Token alpha", "Bearer", "Basic alpha", "Bearer: alpha"):
        assert ask(app, Authorization=scheme).status == 401


def test_the_scheme_may_be_spelt_in_any_case(file: Path) -> None:
    assert ask(guarded(file), Authorization="bearer   alpha").status == 200


def test_health_needs_no_token_and_what_tells_of_models_does(file: Path) -> None:
    app = guarded(file)
    assert ask(app, path="/v2/health/live").status == 200
    assert ask(app, path="/v2/health/ready").status == 200
    for path in ("/v2/health/live/", "/v2/health", "/openapi.json", "/metrics", "/v2/models/m/ready", "/v2/dashboard"):
        assert ask(app, path=path).status == 401, path
    for path in ("/", "/docs", "/dashboard/page.js"):  # pages that ask their reader for the token
        assert ask(app, path=path).status in (200, 404), path
    assert call(app, "POST", "/v2/health/live").status == 401
    assert call(app, "POST", "/v2/models/simple/infer", b"{}").status == 401


def test_tokens_are_rotated_without_a_restart(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = guarded(file)
    assert ask(app, "alpha").status == 200
    new = file.with_name("new")
    new.write_text("gamma\n")
    new.chmod(0o600)
    new.replace(file)
    assert ask(app, "alpha").status == 401
    assert ask(app, "gamma").status == 200
    file.write_text("delta\n")  # as long as before, written in place
    os.utime(file, ns=(1, 1))
    assert ask(app, "gamma").status == 401
    assert ask(app, "delta").status == 200
    file.unlink()
    with caplog.at_level(logging.ERROR):
        assert ask(app, "delta").status == 403
        assert ask(app, "delta").status == 403
    assert caplog.text.count("nobody is let in") == 1  # said once, not for every request
    file.write_text("delta\n")
    assert ask(app, "delta").status == 200


@pytest.mark.parametrize("content", [None, "", "\n\n# nothing\n"])
def test_a_file_that_is_missing_or_empty_lets_nobody_in(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    app = guarded(path)
    assert "nobody is let in" in caplog.text
    for token in (None, "", "nothing", "# nothing"):
        got = ask(app, token)
        assert got.status == 403
        assert "no valid tokens" in got.error
    assert ask(app, path="/v2/health/live").status == 200


def test_a_folder_or_an_endless_file_lets_nobody_in(tmp_path: Path) -> None:
    assert not Tokens(tmp_path)
    long = tmp_path / "long"
    long.write_text("a\n" * 2**20)
    assert not Tokens(long)


def test_every_token_is_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = hmac.compare_digest

    def counted(a: Any, b: Any) -> bool:
        seen.append(len(a))
        return real(a, b)

    tokens = Tokens(file)
    monkeypatch.setattr(hmac, "compare_digest", counted)
    for token in (b"alpha", b"beta", b"a", b"x" * 1000):
        tokens.admit(token)
    assert seen == [32] * 8  # two each, all digests of one length


def test_a_file_that_others_can_read_is_remarked_on(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.chmod(0o644)
    assert Tokens(file)
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize("tokens", [False, True])
def test_a_page_of_another_site_changes_nothing(file: Path, tokens: bool) -> None:
    app = guarded(file if tokens else None)
    key = {"Authorization": "Bearer alpha"} if tokens else {}
    path = "/v2/repository/index"
    for origin in ("https://evil.example", "http://here:81", "null", "http://", "\xff", "http://[bad"):
        got = call(app, "POST", path, b"", {"Host": "here:80", "Origin": origin, **key})
        assert got.status == 403, origin
        assert "another" in got.error or "may not" in got.error
    assert call(app, "POST", path, b"", {"Host": "here:80", "Origin": "http://HERE:80", **key}).status == 200
    assert call(app, "POST", path, b"", {"Host": "here:80", **key}).status == 200
    assert call(app, "GET", "/v2", b"", {"Host": "here:80", "Origin": "https://evil.example", **key}).status == 200


def named(*allowed: str, host: str = "127.0.0.1", tokens: Path | None = None) -> Access:
    """A server that listens at `host`, as `accelerando serve` makes it."""
    settings = Settings(tokens=tokens, hosts=names_of(host, allowed, guarded=tokens is not None))
    return Access(Rest(FakeShelf({"simple": FakeServed()}), settings), settings)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT"])
def test_a_name_that_was_made_to_lead_to_the_loopback_is_turned_away(method: str) -> None:
    """DNS rebinding: for its browser the page is at home here, so that Origin and Host agree, and it could read too."""
    app = named()
    for host in (
        "evil.example:8000",
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "[::2]",
    ):
        got = call(app, method, "/v2/repository/index", b"", {"Host": host, "Origin": f"http://{host}"})
        assert got.status == 403, host
        assert method == "HEAD" or f"this server is not {host!r}, but 127.0.0.1" in got.error
    for strange in ("\xff", "[bad", "http://localhost"):
        assert call(app, method, "/v2", b"", {"Host": strange}).status == 403, strange


def test_its_own_names_are_let_in_by_any_port_and_in_any_case() -> None:
    for host in ("localhost", "LocalHost:8000", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8000"):
        assert call(named(), "GET", "/v2", b"", {"Host": host}).status == 200, host
    assert call(named(), "GET", "/v2").status == 200  # no browser leaves it out
    assert call(named(host="127.0.0.5"), "GET", "/v2", b"", {"Host": "127.0.0.5:80"}).status == 200


def test_names_that_were_allowed_are_let_in_and_bind_it_wherever_it_listens(file: Path) -> None:
    for app in (named("api.example"), named("api.example", host="0.0.0.0"), named("API.example", host="::1")):
        assert call(app, "GET", "/v2", b"", {"Host": "api.example:443"}).status == 200
        assert call(app, "GET", "/v2", b"", {"Host": "localhost"}).status == 200
        assert call(app, "GET", "/v2", b"", {"Host": "evil.example"}).status == 403
    guarded_too = named("api.example", tokens=file)
    assert call(guarded_too, "GET", "/v2", b"", {"Host": "evil", "Authorization": "Bearer alpha"}).status == 403
    for wrong in ("http://api.example", "api.example:80", "", "a/b", "\xff"):
        with pytest.raises(UsageError, match="without scheme and port"):
            named(wrong)


def test_where_others_may_call_it_by_names_that_it_can_not_know_any_will_do(file: Path) -> None:
    assert call(named(host="0.0.0.0"), "GET", "/v2", b"", {"Host": "node7.lan:8000"}).status == 200
    key = {"Host": "node7.lan", "Authorization": "Bearer alpha"}
    assert call(named(tokens=file), "GET", "/v2", b"", key).status == 200


def test_a_socket_needs_a_token_too(file: Path) -> None:
    told: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        told.append(message)

    run(guarded(file)({"type": "websocket", "path": "/", "headers": []}, receive, send))
    assert [message["type"] for message in told] == ["websocket.close"]
    assert told[0]["code"] == 1008


@pytest.mark.parametrize("name", ["max_body_bytes", "max_json_bytes", "max_tensors", "max_rows", "body_seconds"])
def test_a_limit_that_lets_nothing_through_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be above 0, but is 0"):
        Settings(**{name: 0})


def test_a_limit_that_grpc_could_not_count_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 2,147,483,647 bytes, but 2,147,483,648 were asked"):
        Settings(max_body_bytes=2**31)
