"""Structured logs: one JSON object a line, to stderr or to a file.

Serving never waits for a log and never fails by one: lines go through a bounded queue to a thread of their own, and
those that could not be written (the disk is full, the pipe is closed or stalled) are counted in `Journal.lost`.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import queue
import threading
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerando.errors import UsageError

WAITING = 10_000  # lines that may wait to be written
LONGEST = 8_000  # characters of one text
LEVELS = ("debug", "info", "warning", "error")
USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}  # the last is uvicorn's


class Lines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, logger, message, and whatever `extra` was given."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _short(record.getMessage()),
        }
        line.update({key: _plain(value) for key, value in vars(record).items() if key not in USUAL and key not in line})
        if record.exc_info and record.exc_info[0]:
            line["error"] = record.exc_info[0].__name__
            line["traceback"] = _short(self.formatException(record.exc_info))
        return json.dumps(line, allow_nan=False, default=str)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers stay numbers, but for infinities and NaN."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return _short(str(value))


class Journal(logging.Handler):
    """Writes lines from a thread of its own; what can't be written is counted.

    Args:
        path: of the file, to which lines are added; stderr, without it.  Where the file is moved away or removed, as
            log rotation does, a new one is begun.

    Attributes:
        lost: lines that were not written.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.setFormatter(Lines())
        self.lost = 0
        self._path = path
        self._file: io.FileIO | None = None  # no buffer: what could not be written is not tried again later
        self._torn = False  # the last line was written in part
        self._taken: list[tuple[logging.Logger, bool, int]] = []
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="accelerando-log", daemon=True)
        self._thread.start()

    def take(self, loggers: Sequence[str], level: int) -> None:
        """Write the records of these loggers, which go nowhere else until it is closed."""
        for logger in map(logging.getLogger, loggers):
            self._taken.append((logger, logger.propagate, logger.level))
            logger.addHandler(self)
            logger.propagate = False
            logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(self.format(record).encode() + b"\n")
        except Exception:  # noqa: BLE001  a record that can't be formatted, or no room: it must not end a request
            self.lost += 1

    def close(self) -> None:
        """Give the loggers back and write what waits, for a second at most."""
        for logger, propagate, level in self._taken:
            logger.removeHandler(self)
            logger.propagate = propagate
            logger.setLevel(level)
        self._taken.clear()
        try:
            self._waiting.put(None, timeout=0.5)
        except queue.Full:  # nobody reads the pipe
            self.lost += self._waiting.qsize()
        else:
            self._thread.join(0.5)
        super().close()

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._write(line)
            except OSError:  # no room, a closed pipe, a folder that is gone
                self.lost += 1
                self._drop()
        self._drop()

    def _write(self, line: bytes) -> None:
        file = self._open()
        whole = b"\n" + line if self._torn else line
        written = file.write(whole)
        self._torn = written != len(whole)
        if self._torn:
            raise OSError("the line was written in part")

    def _open(self) -> io.FileIO:
        """The file to write to; opened anew where it is no longer the one of its name."""
        if self._file is not None and self._path is not None and not self._is_there(self._path, self._file):
            self._drop()
        if self._file is None:
            self._file = io.FileIO(2, "wb", closefd=False) if self._path is None else io.FileIO(self._path, "ab")
        return self._file

    @staticmethod
    def _is_there(path: Path, file: io.FileIO) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(file.fileno()))
        except OSError:
            return False

    def _drop(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        except OSError:  # some file systems say only now that there was no room; the line has been counted
            return


def begin(
    path: Path | None = None, level: str = "info", loggers: Sequence[str] = ("accelerando", "uvicorn")
) -> Journal:
    """Write the records of these loggers as lines of JSON, until `Journal.close`.

    Args:
        path: of the file; stderr, without it.
        level: debug, info, warning or error: what is less grave is left out.

    Raises:
        UsageError: there is no such level, the file's folder does not exist, or it can't be written to.
    """
    if level not in LEVELS:
        raise UsageError(f"the log level {level!r} was given; it must be one of {', '.join(LEVELS)}")
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"the log file {path} was asked for, but there is no folder {path.parent}; make it first")
    if path is not None:
        try:
            path.open("ab").close()
        except OSError as error:
            raise UsageError(
                f"the log file {path} can't be written: {error.strerror or error}; give another"
            ) from error
    journal = Journal(path)
    journal.take(loggers, getattr(logging, level.upper()))
    return journal
