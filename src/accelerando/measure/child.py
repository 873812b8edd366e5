"""A child process that calls functions for us, under a time limit and a memory limit.

Requests travel as cloudpickle over a private pair of pipes, so that a class defined in a notebook works; nothing
pickled is ever kept.  A segfault, a hang or an out-of-memory kill costs the call in hand: it becomes a
`RefusalError`, and the child is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerando import memory
from accelerando.errors import AccelerandoError, Reason, RefusalError

POLL_SECONDS = 0.05
LENGTH = struct.Struct("<Q")
PR_SET_PDEATHSIG = 1
DETAIL_CHARACTERS = 2000


class Child:
    """A fresh Python process that calls the functions it is given, one at a time.

    Args:
        memory_limit: bytes that it may hold (`memory.held_bytes`) before it is killed; None for no limit.
        name: for messages.
    """

    def __init__(self, name: str, memory_limit: int | None = None) -> None:
        self.name = name
        self.memory_limit = memory_limit
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the child
        ours, theirs = os.pipe(), os.pipe()
        code = "from accelerando.measure.child import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(ours[0]), str(theirs[1])],
            pass_fds=(ours[0], theirs[1]),
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = ours[1], theirs[0]
        self._busy = False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float | None = None,
        heard: Callable[[str], None] = lambda text: None,
    ) -> Any:
        """What the function gives in the child.

        Args:
            timeout: seconds after which the child is killed.
            heard: told whatever the function says on its way, by `say`.

        Raises:
            RefusalError: the function refused, raised, or the child died, hung or outgrew its memory.
            AccelerandoError: any other error of this package that the function raised.
        """
        import cloudpickle

        if not self.alive:
            raise self._obituary()
        self._busy = True
        try:
            self._write(cloudpickle.dumps((function, args)))
            deadline = None if timeout is None else time.monotonic() + timeout
            while (reply := _opened(self._read(deadline, timeout)))[0] == "said":
                heard(reply[1])
        except BrokenPipeError:
            raise self._obituary() from None
        except BaseException:
            self.close()  # the pipe holds half a conversation: this child is of no more use
            raise
        self._busy = False
        kind, value = reply
        if kind == "answer":
            return value
        if isinstance(value, AccelerandoError):
            raise value
        raise RefusalError(Reason.OUT_OF_MEMORY if kind == "memory" else Reason.CRASHED, value)

    def close(self) -> None:
        """End the process, whatever it does."""
        for end in ("_to", "_from"):
            with contextlib.suppress(OSError):
                os.close(getattr(self, end))
            setattr(self, end, -1)
        if self.alive:
            if not self._busy:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(2)
            if self.alive:
                self._kill()
        self._process.wait()
        self._errors.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write(self, message: bytes) -> None:
        data = memoryview(LENGTH.pack(len(message)) + message)
        while data:
            _, ready, _ = select.select([], [self._to], [], POLL_SECONDS)
            if ready:
                data = data[os.write(self._to, data[: 1 << 16]) :]
            elif not self.alive:
                raise BrokenPipeError

    def _read(self, deadline: float | None, timeout: float | None) -> bytes:
        data, size = bytearray(), None
        while size is None or len(data) < size:
            ready, _, _ = select.select([self._from], [], [], POLL_SECONDS)
            if ready:  # no byte beyond this message, for another may follow
                wanted = LENGTH.size if size is None else size
                block = os.read(self._from, min(wanted - len(data), 1 << 20))
                if not block:
                    raise BrokenPipeError
                data += block
                if size is None and len(data) == LENGTH.size:
                    size = LENGTH.unpack_from(data)[0] + LENGTH.size
            elif deadline is not None and time.monotonic() > deadline:
                self._kill()
                raise RefusalError(Reason.TIMED_OUT, f"{self.name} took longer than {timeout:.0f} s and was stopped")
            self._check_memory()
        return bytes(data[LENGTH.size :])

    def _check_memory(self) -> None:
        if self.memory_limit is None:
            return
        with contextlib.suppress(OSError):
            held = memory.held_bytes(self.pid)
            if held > self.memory_limit:
                self._kill()
                raise RefusalError(
                    Reason.OUT_OF_MEMORY,
                    f"{self.name} held {held / 2**20:,.0f} MB; the limit is {self.memory_limit / 2**20:,.0f} MB",
                )

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # its own children too: compilers, for instance
        self._process.wait()

    def _obituary(self) -> RefusalError:
        """Why the process died, as far as can be told."""
        code = self._process.wait()
        words = ""
        if not self._errors.closed:
            self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, self._errors.tell() - DETAIL_CHARACTERS))
            words = self._errors.read().decode(errors="replace").strip()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        reason = Reason.OUT_OF_MEMORY if code == -signal.SIGKILL else Reason.CRASHED
        last = f": {words.splitlines()[-1]}" if words else ""
        return RefusalError(reason, f"{self.name} {how}{last}")


def _opened(message: bytes) -> tuple[str, Any]:
    reply: tuple[str, Any] = pickle.loads(message)  # noqa: S301  our own child's words, over a private pipe
    return reply


_empty: list[int] = []
_replies: list[IO[bytes]] = []


def empty_bytes() -> int:
    """What this child held when it began, before it was given anything."""
    return _empty[0]


def say(text: str) -> None:
    """In a child: tell the parent how the call goes on; elsewhere, nobody is told."""
    for replies in _replies:
        _send(replies, pickle.dumps(("said", text)))


def serve() -> None:
    """The child's side: answer calls until the pipe closes."""
    _empty.append(memory.peak_bytes())
    receive, send = int(sys.argv[1]), int(sys.argv[2])
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed parent leaves nobody behind
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, this is the process to lose
    with os.fdopen(receive, "rb") as requests, os.fdopen(send, "wb") as replies:
        _replies.append(replies)
        while header := requests.read(LENGTH.size):
            _send(replies, _answer(requests.read(LENGTH.unpack(header)[0])))


def _send(replies: IO[bytes], message: bytes) -> None:
    replies.write(LENGTH.pack(len(message)) + message)
    replies.flush()


def _answer(message: bytes) -> bytes:
    import cloudpickle

    try:
        function, args = cloudpickle.loads(message)
        return cloudpickle.dumps(("answer", function(*args)))
    except AccelerandoError as error:
        return cloudpickle.dumps(("error", error))
    except MemoryError:
        return pickle.dumps(("memory", "the process could not get the memory that it asked for"))
    except BaseException as error:  # noqa: BLE001  whatever it was, the parent wants to know
        lines = traceback.format_exception(error)
        detail = f"{type(error).__name__}: {error}\n{''.join(lines)[-DETAIL_CHARACTERS:]}"
        return pickle.dumps(("crash", detail))
