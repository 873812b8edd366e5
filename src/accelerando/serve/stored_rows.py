"""The rows that are stored in a bundle, and whether a rung answers them as it did when it was certified."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from accelerando.bundle import Bundle
from accelerando.machine import Machine
from accelerando.signature import Array

# Of the largest answer: what a rung's answers may move on the very machine, and by the very versions, of its
# certificate.  The same call gives the same bits there, in another process, beside other load and however its threads
# wait; this leaves room for one step of an 8-bit output, about an 80th, should a sum be rounded otherwise.
AT_HOME = 0.02


class StoredRows:
    """The stored rows of one bundle.  Thread-safe.

    They must be asked as they were when they were stored, all in one call: a model whose 8-bit ranges are found at each
    call answers a row otherwise beside other rows.

    Args:
        machine: this one; without it, it is looked at.

    Raises:
        BundleError: the stored rows are damaged.
    """

    def __init__(self, bundle: Bundle, machine: Machine | None = None) -> None:
        self.parity = bundle.parity
        self._at_home = (machine or Machine.look()).key == bundle.machine.key

    def deviation(self, key: str, outputs: Sequence[Array]) -> str | None:
        """What is wrong with flat outputs that the rung of this key gives to them now, or None.

        `Parity.deviation` allows what another processor may change, up to half of what compressing did: a rung that
        was compressed much can become worse by points within that.  So where the machine and all versions are those
        of the certificate, floats must lie within `AT_HOME` of the answers' scale as well.
        """
        if self.parity is None:
            return None
        if key not in self.parity.rungs:
            return "none of its answers were stored"
        if wrong := self.parity.deviation(key, outputs):
            return wrong
        for i, (now, then) in enumerate(zip(outputs, self.parity.rungs[key], strict=True)):
            if not self._at_home or then.dtype.kind != "f" or not then.size:
                continue
            found = float(np.abs(now.astype(np.float64) - then).max())
            allowed = AT_HOME * float(np.abs(then).max())
            if found > allowed:
                return (
                    f"output {i} differs by up to {found:.3g} from what was stored; {allowed:.3g} is allowed on the "
                    f"machine, and by the versions, that stored it"
                )
        return None
