"""A line between two processes of this program: small values by a socket, large arrays in memory that both see."""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

LARGE = 2**16  # bytes of an array from which on it goes by memory: less is quicker in the pickle
ALIGNED = 64  # bytes; an array begins at a multiple of it
HEAD = struct.Struct("<2Q")  # bytes of the message; how many arrays lie in memory, whose lengths follow
CHUNK = 2 * LARGE


class Passage:
    """One end of a line.  For one thread at a time, but for `close`; who sends waits for a reply before it sends again.

    What is sent is pickled, and pickles are loaded here: both ends must be this program.  The bytes of large contiguous
    arrays are kept out of the pickle (protocol 5) and are copied once, into memory that the other end maps.

    Args:
        end: of a pair of connected sockets.
        outbound, inbound: descriptors of files in memory; the other end has them the other way round.
        keep: whether arrays that are received stay as they are when more is received; else they are not copied.
    """

    @classmethod
    def made(cls) -> tuple[Passage, tuple[int, int, int]]:
        """One end, and the descriptors of the other, to be inherited by another process and then closed here."""
        ours, theirs = socket.socketpair()
        there, here = _file(), _file()
        return cls(ours, there, here, keep=True), (theirs.detach(), os.dup(here), os.dup(there))

    @classmethod
    def inherited(cls, end: int, outbound: int, inbound: int) -> Passage:
        """The end of the descriptors that `made` gave."""
        return cls(socket.socket(fileno=end), outbound, inbound, keep=False)

    def __init__(self, end: socket.socket, outbound: int, inbound: int, keep: bool) -> None:
        self._end, self._keep = end, keep
        self._out, self._in = _Memory(outbound), _Memory(inbound)
        self._came = bytearray()  # of a message, so far
        self._using = threading.Lock()
        self._close = weakref.finalize(self, _close, end, outbound, inbound)

    def close(self) -> None:
        """Hang up: a thread that waits on the line gets EOFError or OSError.  Arrays that were received stay.

        The descriptors are closed only when that thread has left, for their numbers may be given to others at once.
        """
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        with self._using:
            self._close()
            self._out, self._in = _Memory(-1), _Memory(-1)

    def send(self, value: Any, seconds: float | None = None) -> None:
        """Raises OSError where nobody is at the other end, and TimeoutError where it takes nothing for so long."""
        apart: list[memoryview] = []

        def keep_in(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if small := raw.nbytes < LARGE:
                return small
            apart.append(raw)
            return False

        pickled = pickle.dumps(value, protocol=5, buffer_callback=keep_in)
        lengths = [raw.nbytes for raw in apart]
        places, end = _places(lengths)
        whole = HEAD.size + 8 * len(apart) + len(pickled)
        head = HEAD.pack(whole, len(apart)) + struct.pack(f"<{len(apart)}Q", *lengths)
        with self._using:
            if apart:
                area = self._out.at_least(end)
                for raw, place in zip(apart, places, strict=True):
                    area[place : place + raw.nbytes] = raw
            self._end.settimeout(seconds)
            self._end.sendall(head + pickled)

    def comes_within(self, seconds: float) -> bool:
        """Whether something comes that `receive` has news of, which then need not wait.

        It looks again and again instead of sleeping, for to be woken by another core takes longer than a small model;
        where there is but one core, whoever is to answer has it between two looks.
        """
        with self._using:
            try:
                self._end.settimeout(0)
                until = time.perf_counter() + seconds
                while time.perf_counter() < until:
                    with suppress(BlockingIOError):
                        self._come(HEAD.size)
                        return True
                    os.sched_yield()
                return False
            except (EOFError, OSError):
                return True  # `receive` will say so

    def receive(self, seconds: float | None = None) -> Any:
        """What was sent.

        Raises:
            EOFError, OSError: nobody is at the other end (any longer).
            TimeoutError: it has not come for so long; it can be waited for again.
        """
        with self._using:
            self._end.settimeout(seconds)
            self._come(HEAD.size)
            whole, count = HEAD.unpack_from(self._came)
            self._come(whole)
            message, self._came = memoryview(self._came), bytearray()
            begin = HEAD.size + 8 * count
            parts: list[Any] = []
            if count:
                lengths = struct.unpack_from(f"<{count}Q", message, HEAD.size)
                places, end = _places(lengths)
                area = self._in.at_least(end)
                parts = [area[place : place + length] for place, length in zip(places, lengths, strict=True)]
                if self._keep:
                    parts = [bytearray(part) for part in parts]
            return pickle.loads(message[begin:], buffers=parts)  # noqa: S301  see above

    def _come(self, size: int) -> None:
        """Wait for so many bytes of the message."""
        while len(self._came) < size:
            if not (data := self._end.recv(max(CHUNK, size - len(self._came)))):
                raise EOFError("the other end hung up")
            self._came += data


class _Memory:
    """One file in memory, mapped as far as it was asked for."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._map: mmap.mmap | None = None

    def at_least(self, size: int) -> memoryview:
        """Its first bytes, so many or more."""
        if self._map is None or len(self._map) < size:
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, 1 << (size - 1).bit_length())
            self._map = mmap.mmap(self._file, os.fstat(self._file).st_size)  # the old one lasts as long as its arrays
        return memoryview(self._map)


def _close(end: socket.socket, *files: int) -> None:
    end.close()
    for file in files:
        os.close(file)


def _file() -> int:
    """An empty file in memory: its descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("accelerando")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _places(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where arrays of these lengths begin, and where the last one ends."""
    places, end = [], 0
    for length in lengths:
        places.append(-(-end // ALIGNED) * ALIGNED)
        end = places[-1] + length
    return places, end
