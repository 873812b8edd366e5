"""Work that must not hold up those who are being served."""

from __future__ import annotations

import logging
import os
import sys
import threading
from importlib import import_module

log = logging.getLogger(__name__)
NICENESS = 10  # about a tenth of a contended core: nobody who serves notices, and it comes to an end under any load


def import_gently(*names: str) -> None:
    """Import modules in a thread of low priority: reading a large library keeps a core busy for a third of a second.

    On Linux a thread has a priority of its own, which whoever may not raise priorities could never raise again; so it
    is not for work that starts threads which serve later.  Elsewhere they are imported as usual.  A module that can't
    be imported is left to whoever needs it, and says why there.
    """

    def work() -> None:
        if sys.platform == "linux":
            os.nice(NICENESS)
        for name in names:
            try:
                import_module(name)
            except Exception as error:  # noqa: BLE001  as said
                log.debug("%s can't be imported: %s", name, error)
                return

    thread = threading.Thread(target=work, name="accelerando-import")
    thread.start()
    thread.join()
