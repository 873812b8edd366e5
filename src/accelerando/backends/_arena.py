"""One arena for the sessions of ONNX Runtime in this process, instead of one for each.

A session takes memory for a call from its arena, and gives it back to the arena when the call is done.  Where one
session runs at a time, as under a governor, one arena as large as the hungriest call does for all.
"""

from __future__ import annotations

import logging
from functools import cache
from threading import RLock
from typing import Any

import numpy as np

# y = Identity(x), numbers without axes: the smallest model, for a call that needs nothing.
IDENTITY = (
    b'\x08\x08:/\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0b\n\x01x\x12\x06\n\x04\x08\x01\x12\x00'
    b"b\x0b\n\x01y\x12\x06\n\x04\x08\x01\x12\x00B\x04\n\x00\x10\r"
)
log = logging.getLogger(__name__)
_lock = RLock()  # a runner that is collected in here closes, and comes in once more


def join_arena(options: Any) -> None:
    """Have the session of these options take memory from the arena that all share, which begins with the first.

    Where the program has registered one of its own and ONNX Runtime refuses a second (1.20 does, 1.31 takes it without
    a word), sessions share that one.
    """
    with _lock:
        _begin()
    options.add_session_config_entry("session.use_env_allocators", "1")


@cache
def _begin() -> None:
    import onnxruntime as ort

    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(info, None)
    except Exception as error:  # noqa: BLE001  of several kinds by version; sessions share the one that is there, if any
        log.debug("no arena was made for all sessions: %s", error)


def shrink_arena() -> None:
    """Give back what no session holds of the arena that all share, which else stays as large as it ever was.

    ONNX Runtime does so only at the end of a call, so there is one; it takes microseconds where nothing is to be freed.
    """
    with _lock:
        if not _begin.cache_info().currsize:
            return  # no session has joined
        session, options = _smallest()
    session.run(None, {"x": np.zeros((), np.float32)}, options)


@cache
def _smallest() -> tuple[Any, Any]:
    """A session in that arena, and the options of a call that shrinks it."""
    import onnxruntime as ort

    options, call = ort.SessionOptions(), ort.RunOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    call.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return ort.InferenceSession(IDENTITY, options, providers=["CPUExecutionProvider"]), call
