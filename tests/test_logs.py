"""Logs are lines of JSON, and serving goes on where they can't be written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from accelerando.errors import RowsError, UsageError
from accelerando.server import logs


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_is_one_line_of_json_with_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "log"
    journal = logs.begin(path, "info", ("accelerando.test",))
    log = logging.getLogger("accelerando.test.deep")
    log.info("rung %d\nstands", 3, extra={"model": "digits", "seconds": float("nan"), "rows": 7, "odd": {1, 2}})
    log.debug("not told")
    try:
        raise RowsError("\ud800 poison")
    except RowsError:
        log.exception("failed")
    journal.close()
    first, second = lines(path)
    assert (first["level"], first["message"], first["model"], first["rows"]) == ("info", "rung 3\nstands", "digits", 7)
    assert (first["seconds"], first["odd"], first["logger"]) == ("nan", "{1, 2}", "accelerando.test.deep")
    assert first["time"].endswith("Z")
    assert second["error"] == "RowsError"
    assert "poison" in second["traceback"]
    assert journal.lost == 0
    assert logging.getLogger("accelerando.test").propagate
    assert not logging.getLogger("accelerando.test").handlers


def test_a_full_disk_is_counted_and_never_raised() -> None:
    journal = logs.begin(Path("/dev/full"), loggers=("accelerando.full",))
    for i in range(50):
        logging.getLogger("accelerando.full").warning("line %d", i)
    journal.close()
    assert journal.lost == 50


def test_a_record_that_can_not_be_formatted_is_counted(tmp_path: Path) -> None:
    journal = logs.begin(tmp_path / "log", loggers=("accelerando.odd",))
    logging.getLogger("accelerando.odd").warning("%d", "not a number")
    journal.close()
    assert journal.lost == 1


def test_a_closed_and_a_stalled_pipe_do_not_hold_anything_up(tmp_path: Path) -> None:
    """In processes of their own: stderr is the pipe."""
    code = (
        "import logging, time; from accelerando.server import logs\n"
        "journal = logs.begin(loggers=('accelerando.pipe',)); log = logging.getLogger('accelerando.pipe')\n"
        "for i in range(12000): log.warning('line %d %s', i, 'x' * 200)\n"
        "journal.close(); print(journal.lost)"
    )
    for reader in ("closed", "stalled"):
        ours, theirs = os.pipe()
        if reader == "closed":
            os.close(ours)
        done = subprocess.run(
            [sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, timeout=60, check=True
        )
        os.close(theirs)
        lost = int(done.stdout)
        assert lost == 12000 if reader == "closed" else lost > 1000, (reader, lost)
        if reader == "stalled":
            os.close(ours)


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    journal = logs.begin(path, loggers=("accelerando.moved",))
    log = logging.getLogger("accelerando.moved")
    log.warning("one")
    end = time.monotonic() + 10
    while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
        time.sleep(0.01)
    path.rename(old)
    log.warning("two")
    journal.close()
    assert [line["message"] for line in lines(old)] == ["one"]
    assert [line["message"] for line in lines(path)] == ["two"]


def test_a_level_or_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="debug, info, warning, error"):
        logs.begin(level="loud")
    with pytest.raises(UsageError, match="make it first"):
        logs.begin(tmp_path / "none" / "log")
    with pytest.raises(UsageError, match="can't be written"):
        logs.begin(tmp_path)
