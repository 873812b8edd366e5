"""What goes through a line between two processes comes out as it went in, whatever its size."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerando.serve.passage import LARGE, Passage

SIZES = (0, 1, 63, 64, LARGE // 4 - 1, LARGE // 4, LARGE // 4 + 1, 100_000)


@pytest.fixture
def ends() -> Iterator[tuple[Passage, Passage]]:
    ours, descriptors = Passage.made()
    theirs = Passage.inherited(*descriptors)
    yield ours, theirs
    ours.close()
    theirs.close()


def exchange(here: Passage, there: Passage, value: Any) -> Any:
    """Send it from a thread of its own: more than the socket holds must be taken meanwhile."""
    sender = threading.Thread(target=here.send, args=(value, 30))
    sender.start()
    came = there.receive(30)
    sender.join()
    return came


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.sampled_from(SIZES), max_size=4),
    dtype=st.sampled_from(["float32", "int64", "float16", "bool", "uint8"]),
    back=st.booleans(),
    step=st.sampled_from([1, 2]),
)
def test_arrays_come_out_as_they_went_in(
    ends: tuple[Passage, Passage], sizes: list[int], dtype: str, back: bool, step: int
) -> None:
    here, there = reversed(ends) if back else ends
    arrays = [(np.arange(size * step) % 251).astype(dtype)[::step] for size in sizes]
    word, came = exchange(here, there, ("some words", arrays))
    assert word == "some words"
    for array, arrived in zip(arrays, came, strict=True):
        np.testing.assert_array_equal(array, arrived)
        assert arrived.dtype == array.dtype
        assert arrived.flags.writeable


def test_who_waits_on_a_line_that_is_closed_is_told_so(ends: tuple[Passage, Passage]) -> None:
    ours, theirs = ends
    kept = exchange(theirs, ours, np.full(LARGE, 3.0))
    told: list[Exception] = []

    def wait() -> None:
        try:
            ours.receive(30)
        except (EOFError, OSError) as error:
            told.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not ours._using.locked():
        time.sleep(0.001)
    ours.close()
    waiting.join(10)
    assert len(told) == 1
    assert not isinstance(told[0], TimeoutError)
    for talk in (lambda: ours.send(np.zeros(LARGE)), lambda: ours.send(1), ours.receive):
        with pytest.raises(OSError, match="Bad file descriptor"):
            talk()
    assert ours.comes_within(1.0)  # that is what `receive` tells
    assert (kept == 3.0).all()
    ours.close()


def test_what_is_kept_stays_as_it_was_when_more_comes(ends: tuple[Passage, Passage]) -> None:
    ours, theirs = ends
    kept = [exchange(theirs, ours, np.full(LARGE, value)) for value in range(3)]
    assert [(array == value).all() for value, array in enumerate(kept)] == [True] * 3


def test_what_came_in_memory_is_not_copied_where_it_need_not_be_kept(ends: tuple[Passage, Passage]) -> None:
    ours, theirs = ends
    first = exchange(ours, theirs, np.zeros(LARGE))
    exchange(ours, theirs, np.ones(LARGE))
    assert (first == 1).all()


def test_an_exception_travels_too(ends: tuple[Passage, Passage]) -> None:
    came = exchange(*ends, (False, ValueError("a reason")))
    assert isinstance(came[1], ValueError)
    assert str(came[1]) == "a reason"


def test_who_waited_in_vain_can_wait_again(ends: tuple[Passage, Passage]) -> None:
    ours, theirs = ends
    assert not ours.comes_within(0.001)
    with pytest.raises(TimeoutError):
        ours.receive(0.001)
    theirs._end.sendall(b"\x00")  # the first byte of a message of 256 bytes and more: a part of one is no message
    assert not ours.comes_within(0.001)
    with pytest.raises(TimeoutError):
        ours.receive(0.001)


def test_a_message_may_come_byte_by_byte(ends: tuple[Passage, Passage]) -> None:
    ours, theirs = ends
    theirs.send(["slowly", np.arange(5)])
    whole = ours._end.recv(100_000)
    for i in range(len(whole)):
        theirs._end.sendall(whole[i : i + 1])
        if i + 1 < len(whole):
            with pytest.raises(TimeoutError):
                ours.receive(1e-4)
    word, array = ours.receive(30)
    assert (word, array.tolist()) == ("slowly", [0, 1, 2, 3, 4])


def test_who_hangs_up_is_noticed(ends: tuple[Passage, Passage]) -> None:
    ours, theirs = ends
    theirs.close()
    assert ours.comes_within(30), "that is news"
    with pytest.raises((EOFError, OSError)):
        ours.receive(30)
    with pytest.raises(OSError, match="pipe"):
        ours.send("anybody?", 30)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what is open is told by /proc")
def test_nothing_stays_open() -> None:
    def open_files() -> set[str]:
        return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}

    before = open_files()
    for _ in range(5):
        ours, descriptors = Passage.made()
        theirs = Passage.inherited(*descriptors)
        exchange(ours, theirs, np.zeros(LARGE))
        del ours, theirs
    assert not {name for name in open_files() - before if "accelerando" in name or "socket" in name}
