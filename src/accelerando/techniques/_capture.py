"""torch.export with the axes dynamic that a signature says may change."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Array, Signature
from accelerando.techniques._parity import first_lines
from accelerando.techniques._quiet import quiet

MOST_ROWS = 1 << 20  # an upper bound that no batch reaches; compilers want one


def capture(flat: Any, signature: Signature, leaves: Sequence[Array], strict: bool = False) -> Any:
    """The ExportedProgram of a flat module, which is not changed.

    First with named dimensions, then with torch's own guesses, where its solver wants other bounds than ours.

    Raises:
        RefusalError: torch.export fails in both ways.
    """
    try:
        return _export(flat, signature, leaves, strict, named=True)
    except RefusalError as first:
        try:
            return _export(flat, signature, leaves, strict, named=False)
        except RefusalError:
            raise first from None


def _export(flat: Any, signature: Signature, leaves: Sequence[Array], strict: bool, named: bool) -> Any:
    import torch
    from torch.export import Dim, export

    if any(isinstance(m, torch.nn.RNNBase) for m in flat.modules()):
        flat = copy.deepcopy(flat)  # tracing assigns to the weight lists of recurrent layers
    axes = {a for p in signature.inputs for a in p.shape if isinstance(a, str)}
    dims = {a: Dim(a, min=1, max=MOST_ROWS) if named else Dim.DYNAMIC for a in axes}
    shapes = tuple({i: dims[a] for i, a in enumerate(p.shape) if isinstance(a, str)} for p in signature.inputs)
    tensors = tuple(torch.from_numpy(x) for x in leaves)
    # Without this a program traced with two rows may not take one: torch assumes that no dynamic axis has length 1.
    one = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with quiet(), torch.no_grad(), one:
            return export(flat, tensors, dynamic_shapes=(shapes,), strict=strict)
    except Exception as error:
        raise RefusalError(Reason.EXPORT_FAILED, first_lines(error)) from error
