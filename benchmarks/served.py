"""`accelerando serve` in a process of its own, as anybody would start it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerando.memory import resident_bytes

START_SECONDS = 120.0
COMMAND = (sys.executable, "-c", "from accelerando.cli import main; main()", "serve")


class Server:
    """A server of one bundle, ended by the end of the `with`.

    Args:
        name: of the model.
        options: of `accelerando serve`, besides the ports.

    Raises:
        RuntimeError: it did not start, or its rungs did not load; its own words are in the message.
    """

    def __init__(self, name: str, bundle: Path, *options: str) -> None:
        self.name, self.host = name, "127.0.0.1"
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115  closed with the server
        command = [*COMMAND, f"{name}={bundle}", "--port", "0", "--grpc-port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        try:
            self.port, self.grpc_port = self._ports()
            self.wait_for_rungs()
        except BaseException:
            self.close()
            raise

    def _ports(self) -> tuple[int, int]:
        """What it says that it listens on, once it does."""
        assert self.process.stdout
        guard = threading.Timer(START_SECONDS, self.process.kill)
        guard.start()
        found: list[int] = []
        while len(found) < 2 and (line := self.process.stdout.readline()):
            found.append(int(line.rsplit(":", 1)[1]))
        guard.cancel()
        if len(found) < 2:
            raise RuntimeError(f"the server did not start: {self._words()}")
        return found[0], found[1]

    def wait_for_rungs(self) -> None:
        """Wait until every rung is loaded, or has failed."""
        end = time.monotonic() + START_SECONDS
        while any(rung["state"] in ("out", "loading") for rung in self.status()["rungs"]):
            if time.monotonic() > end:
                raise RuntimeError(f"rungs were still loading after {START_SECONDS:g} s: {self.status()['rungs']}")
            time.sleep(0.2)

    def _words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:]

    def ask(self, path: str, method: str = "GET", body: Any = None, timeout: float = 60.0) -> Any:
        """What it answers to a request of JSON."""
        request = urllib.request.Request(
            f"http://{self.host}:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"content-type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read() or "{}")

    def status(self) -> Any:
        """What its model tells of itself."""
        (model,) = self.ask("/v2/dashboard/state")["models"]
        return model["status"]

    def set_goal(self, goal: str) -> None:
        """Ask for something else from now on."""
        self.ask(f"/v2/models/{self.name}/goal", "PUT", {"goal": goal})

    def reload(self) -> None:
        """Have it go over to what the bundle's folder holds by now; it is done when this returns."""
        self.ask(f"/v2/repository/models/{self.name}/load", "POST")

    @property
    def version(self) -> str:
        """Of the bundle that answers."""
        return str(self.ask(f"/v2/models/{self.name}")["versions"][-1])

    def memory(self) -> int:
        """Resident bytes of the server and the process that computes for it."""
        return sum(resident_bytes(pid) for pid in (self.process.pid, *_children(self.process.pid)))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _children(pid: int) -> list[int]:
    """The processes that a process started, by whichever of its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += map(int, (thread / "children").read_text().split())
    return found
