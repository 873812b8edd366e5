"""Where memory is short: the work is made smaller and done again, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerando.errors import Reason, RefusalError, UsageError

Found = TypeVar("Found")
WORDS = re.compile(  # torch's, the allocator's, and oneDNN's, which has no others for it
    "not enough memory|can't allocate memory|out of memory|bad_alloc|could not (create|execute) a primitive(?! desc)"
)


def fitted(work: Callable[[], Found], shrink: Callable[[], None]) -> Found:
    """What the work gives; whenever it does not fit into memory, it is made smaller and done from its beginning.

    Args:
        shrink: makes it smaller.

    Raises:
        RefusalError: OUT_OF_MEMORY: `shrink` says that it can't be made smaller.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not is_shortage(error):
                raise
        shrink()  # out here: the error holds on to what was in memory when it was raised


@contextmanager
def shortage_refused() -> Iterator[None]:
    """An error for want of memory, whatever its type, becomes a refusal.

    Raises:
        RefusalError: OUT_OF_MEMORY.
    """
    try:
        yield
    except Exception as error:
        if not is_shortage(error):
            raise
        what = f"{type(error).__name__}: {str(error)[:300]}"
        raise RefusalError(Reason.OUT_OF_MEMORY, f"what a lesson keeps does not fit into the rest: {what}") from error


def in_lesson(error: UsageError) -> BaseException:
    """What the owner's own mistake is in the middle of a lesson: a refusal; want of memory is none of them."""
    cause = error.__cause__
    return cause if cause is not None and is_shortage(cause) else RefusalError(Reason.UNSUPPORTED, str(error))


def is_shortage(error: BaseException) -> bool:
    """Whether it was raised for want of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and WORDS.search(str(error).lower()) is not None
