"""The progress view: live on a terminal, few plain lines when piped, and never the end of a search."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import pytest
from reported import BEST, HOSTILE, NARROW, ORIGINAL, PLAIN, healed_trials
from reported import refused as turn_away
from reported import verified as a_trial
from rich.console import Console

from accelerando.errors import Reason
from accelerando.report.progress import Progress, Quiet, Watcher


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def story(watcher: Watcher, clock: Clock | None = None) -> bool:
    """A short search, told to a watcher; whether it came to its end."""
    original, plain, best = a_trial(ORIGINAL, 1.0), a_trial(PLAIN, 3.0), a_trial(BEST, 6.0)
    with watcher:
        for trial, leader in ((original, None), (plain, plain), (best, best)):
            if clock:
                clock.now += 30
            watcher.phase("looking for faster recipes")
            watcher.trying(trial.recipe, "measuring")
            watcher.found(trial, leader)
        watcher.found(turn_away(PLAIN, Reason.CRASHED, HOSTILE), best)
        watcher.phase("certifying")
        watcher.note(HOSTILE)
        return True
    return False  # the watcher swallowed an error of the search's own


def piped(stream: Any) -> Console:
    return Console(file=stream, width=80)


def test_piped_lines_are_the_notable_ones() -> None:
    stream, clock = io.StringIO(), Clock()
    story(Progress(120.0, piped(stream), clock), clock)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[0:30] looking for faster recipes"
    assert sum("looking for faster recipes" in line for line in lines) == 1  # said again, shown once
    assert [line.split(":")[1][:2] for line in lines if "best so far" in line] == ["00", "30"]
    assert not any("measuring" in line or "turned away" in line for line in lines[:-1])
    assert lines[-1] == "3 tried, 1 turned away, 1 min 30 s of 2 min"
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_shows_what_is_tried_the_best_and_the_time() -> None:
    stream, clock = io.StringIO(), Clock()
    watcher = Progress(120.0, Console(file=stream, width=80, force_terminal=True), clock)
    with watcher:
        watcher.trying(BEST, "measuring")
        watcher.found(a_trial(BEST, 6.0), a_trial(BEST, 6.0))
        clock.now = 42.0
        probe = Console(file=io.StringIO(), width=80)
        probe.print(watcher._lines())
        lines = probe.file.getvalue().splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert "measuring: ONNX Runtime, int8 static (entropy), 1 thread" in lines[0]
    assert "drop 0.0 points" in lines[1]
    assert "1 tried, 0 turned away, 42 s of 2 min" in lines[2]


def lesson(watcher: Watcher, clock: Clock) -> None:
    """Two minutes of healing, told of every two seconds, and the trials of a search with lessons."""
    with watcher:
        watcher.phase("healing a shape that is fast enough")
        for second in range(0, 120, 2):
            clock.now += 2
            watcher.trying(NARROW, f"healing {second} of 120 s, accuracy 0.953")
        for trial in healed_trials():
            watcher.found(trial, None)


def test_a_lesson_is_heard_of_now_and_then_when_piped() -> None:
    stream, clock = io.StringIO(), Clock()
    lesson(Progress(1800.0, piped(stream), clock), clock)
    lines = stream.getvalue().splitlines()
    assert lines[1].startswith(
        "[0:20] healing 18 of 120 s, accuracy 0.953, 29 min 40 s left: ONNX Runtime, fewer layers"
    )
    assert len(lines) == 8  # the phase, one of ten reports of the lesson, the counts
    assert max(map(len, lines)) <= 120
    assert lines[-1] == "10 tried, 1 turned away, 3 shapes measured, 2 min of 30 min"


def test_a_lesson_is_seen_with_the_time_that_is_left_on_a_narrow_terminal() -> None:
    clock = Clock()
    watcher = Progress(1800.0, Console(file=io.StringIO(), width=80, force_terminal=True), clock)
    with watcher:
        watcher.phase("healing a shape that is fast enough")
        clock.now = 62.0
        watcher.trying(NARROW, "healing 23 of 60 s, mean-iou 0.953")
        probe = Console(file=io.StringIO(), width=80)
        probe.print(watcher._lines())
    lines = probe.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "healing 23 of 60 s, mean-iou 0.953: ONNX Runtime, fewer layers" in lines[0]
    assert "1 min 2 s of 30 min, 28 min 58 s left" in lines[2]


class Broken(io.StringIO):
    """A pipe whose reader went away."""

    tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        raise BrokenPipeError(32, "Broken pipe")


class Ascii(io.StringIO):
    encoding = "ascii"

    def write(self, text: str) -> int:
        text.encode("ascii")
        return super().write(text)


def test_the_reader_who_went_away_was_written_to() -> None:
    stream = Broken()
    assert story(Progress(10.0, piped(stream)))
    assert stream.tried > 0


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Broken(), closed(), Ascii()], ids=["broken", "closed", "ascii"])
@pytest.mark.parametrize("terminal", [False, True])
def test_an_odd_stream_never_ends_the_search(stream: Any, terminal: bool) -> None:
    assert story(Progress(10.0, Console(file=stream, width=80, force_terminal=terminal)))


def test_a_reader_that_leaves_a_real_pipe_never_ends_the_search() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", closefd=False, buffering=1) as stream:
        assert story(Progress(None, piped(stream)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # or closing the stream would complain, and rightly
    os.close(write)


def test_two_live_views_do_not_fight() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Progress(None, console):
        story(Progress(None, console))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue()


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    story(Quiet())
    assert capsys.readouterr() == ("", "")


def test_by_default_it_is_standard_error_that_is_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    story(Progress(None))
    out, err = capsys.readouterr()
    assert out == ""
    assert "best so far" in err
    assert sys.stderr.writable()
