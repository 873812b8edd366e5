"""The rows of which a bundle stores every rung's answers: how often two rungs agree is known from them."""

from __future__ import annotations

import numpy as np

from accelerando.measure.arm import PROBE_ROWS
from accelerando.signature import Array
from accelerando.workload import Workload, filled

MOST_ROWS = 1024
MOST_BYTES = 128 * 2**20  # of inputs that an arm is sent


def rows_to_ask(workload: Workload) -> tuple[Array, ...]:
    """Flat inputs of the certify split, drawn at random from those of the commonest shape; a call takes one shape only.

    Nothing was selected on these rows, and the first of them are as good a sample as all: an arm that is slow answers
    no more of them than it has time for.
    """
    chunk, size = max(workload.certify.chunks, key=len), workload.fixed_batch
    room = MOST_BYTES * len(chunk) // max(1, sum(x.nbytes for x in chunk.inputs))
    count = min(len(chunk), MOST_ROWS, max(room, PROBE_ROWS))
    if size is not None:
        count = max(count // size, 1) * size
    rows = np.random.default_rng(0).permutation(len(chunk))[:count]
    return filled(chunk.rows(rows).inputs, None if size is None else count)
