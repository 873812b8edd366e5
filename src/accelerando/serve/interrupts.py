"""What plugins and callbacks raise beside Exceptions: it must not end a thread that others wait for."""

from __future__ import annotations

import threading


def is_interrupt(error: BaseException) -> bool:
    """Whether this is the user's Ctrl-C, which goes on its way: it comes to the main thread, and no other.

    A `SystemExit` and its like, or a `KeyboardInterrupt` elsewhere, is a failure of whoever raised it.
    """
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
