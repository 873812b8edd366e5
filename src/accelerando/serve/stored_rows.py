"""The rows that are stored in a bundle, and whether a rung answers them as it did when it was certified."""

from __future__ import annotations

from collections.abc import Sequence

from accelerando.bundle import Bundle
from accelerando.machine import Machine
from accelerando.signature import Array


class StoredRows:
    """The stored rows of one bundle.  Thread-safe.

    Args:
        machine: this one; without it, it is looked at.

    Raises:
        BundleError: the stored rows are damaged.
    """

    def __init__(self, bundle: Bundle, machine: Machine | None = None) -> None:
        self.parity = bundle.parity
        self._at_home = (machine or Machine.look()).key == bundle.machine.key

    def deviation(self, key: str, outputs: Sequence[Array]) -> str | None:
        """What is wrong with flat outputs that the rung of this key gives to them now, or None: `Parity.deviation`."""
        if self.parity is None:
            return None
        if key not in self.parity.rungs:
            return "none of its answers were stored"
        return self.parity.deviation(key, outputs, self._at_home)
