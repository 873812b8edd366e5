"""Calibration rows as the runtimes take them: dicts of arrays by name, in small batches."""

from __future__ import annotations

from collections.abc import Iterator

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, Signature
from accelerando.workload import Samples

# Post-training quantization gains nothing from more: ONNX Runtime's own examples take 100 rows or so, NNCF 300.
ROWS = 128
RANKING_ROWS = 24  # a ranking needs the order of the errors, not their size
BATCH = 8  # histograms keep every activation of a batch in memory


def feeds(rows: Samples, signature: Signature, size: int = BATCH) -> Iterator[dict[str, Array]]:
    """Batches of at most `size` rows by input name, each (rows, ...).

    A model whose batch is fixed gets batches of just that size, and the rows that are left over are not used.

    Raises:
        RefusalError: there are too few rows for one batch.
    """
    fixed = signature.inputs[0].shape[0]
    step = fixed if isinstance(fixed, int) else size
    names, count = [port.name for port in signature.inputs], 0
    for batch in rows.batches(step):
        if isinstance(fixed, str) or len(batch) == step:
            count += 1
            yield dict(zip(names, batch.inputs, strict=True))
    if not count:
        raise RefusalError(
            Reason.UNSUPPORTED,
            f"the model takes batches of {step}, but calibration has {len(rows)} rows; give more data",
        )
