"""NNCF without its chatter: no telemetry, no progress bars, no log; and what its techniques share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerando.errors import Reason, RefusalError
from accelerando.signature import Signature
from accelerando.techniques._calibration import feeds
from accelerando.techniques._quiet import quiet
from accelerando.workload import Samples

QUANTIZED = ("FakeQuantize", "FakeConvert")
ATTENTION = ("ScaledDotProductAttention",)


def load_nncf() -> Any:
    """The package, with its telemetry off before it is first imported: no word leaves this machine."""
    os.environ["NNCF_CI"] = "1"  # NNCF then puts a stub in its telemetry's place
    with quiet():
        import nncf
    return nncf


def read_openvino(path: Path) -> Any:
    """An OpenVINO model from its .xml, read whole: its .bin is not mapped, so that nothing can write through."""
    import openvino

    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    return core.read_model(str(path))


def save_openvino(model: Any, folder: Path) -> Path:
    """Write .xml and .bin into a folder; float weights stay float32."""
    import openvino

    path = folder / "model.xml"
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def dataset(nncf: Any, rows: Samples, signature: Signature) -> tuple[Any, int]:
    """Calibration rows one by one, which is what NNCF's statistics are made for, and how many there are."""
    items = list(feeds(rows, signature, size=1))
    return nncf.Dataset(items), len(items)


def refuse_quantized(kinds: Iterable[str]) -> None:
    """Raises RefusalError where a model holds quantized operators already."""
    if done := sorted(set(kinds) & set(QUANTIZED)):
        raise RefusalError(Reason.NOTHING_TO_DO, f"it is quantized already: it holds {done[0]}")
