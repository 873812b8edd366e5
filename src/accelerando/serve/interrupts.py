"""What must not end, or hold up, a thread that others wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable

OURS = "accelerando-"  # how the names of our threads begin; they are daemons


def is_interrupt(error: BaseException) -> bool:
    """Whether this is the user's Ctrl-C, which goes on its way: it comes to the main thread, and to no other.

    A `SystemExit` and its like, or a `KeyboardInterrupt` elsewhere, is a failure of whoever raised it.
    """
    return isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()


def apart_from_ours(work: Callable[[], object], busy: int) -> None:
    """Do what waits for our threads, in a new one where this is one of ours, or the one that is `busy` with their work.

    The new one is no daemon, so that a program that ends waits for it.
    """
    here = threading.current_thread()
    if here.ident == busy or (here.daemon and here.name.startswith(OURS)):
        threading.Thread(target=work, name=f"{OURS}closing", daemon=False).start()
    else:
        work()
