"""Exact rewrites of an ONNX graph that backends miss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.techniques._linear_maps import merge_linear_maps
from accelerando.techniques._needless_rows import drop_needless_rows
from accelerando.techniques._parity import ensure_same_onnx, first_lines
from accelerando.techniques._quiet import quiet
from accelerando.workload import Form, Model, Samples

INLINE_BYTES = 1_500_000_000  # a protobuf holds at most 2 GiB
SMALL = 1 << 20  # elements; a folded constant beyond this would cost more to read than to compute
FREE = ("Constant", "Identity")  # every backend drops these itself


@dataclass(frozen=True)
class Fold(Technique):
    """Merge, move and remove operators such that the function stays the same.

    Constants are folded, batch norm goes into the convolution before it, dropout and dead branches go (onnxscript's
    optimizer); consecutive linear maps become one where that is cheaper; and rows of a sequence that are thrown away
    later (a transformer of which only the first token is read) are thrown away before the work on them is done.

    Args:
        rows: whether needless rows are dropped early.
    """

    rows: bool = True

    takes: ClassVar[Form] = Form.ONNX
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.LOWER
    exact: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Fold]:
        return [cls()]

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        path = folder / "model.onnx"
        try:
            with quiet():
                notes = self._rewrite(Path(model.content), path)
        except RefusalError:
            raise
        except Exception as error:
            raise RefusalError(Reason.UNSUPPORTED, f"the rewriter stops: {first_lines(error)}") from error
        worst = ensure_same_onnx(model, path, data)
        said = [f"fold: {note}" for note in notes]
        return model.changed(Form.ONNX, path, *said, f"fold: within {worst:.1e} of what it was")

    def _rewrite(self, source: Path, path: Path) -> list[str]:
        """Write the rewritten model, and say what was done.

        Raises:
            RefusalError: there was nothing to do.
        """
        import onnx_ir as ir
        from onnxscript import optimizer

        model = ir.load(source)
        before = _operators(model)
        optimizer.optimize_ir(model, output_size_limit=SMALL)
        notes = merge_linear_maps(model.graph)
        if self.rows:
            notes += drop_needless_rows(model.graph)
        optimizer.optimize_ir(model, output_size_limit=SMALL)
        after = _operators(model)
        if before == after and not notes:
            raise RefusalError(Reason.NOTHING_TO_DO, f"its {sum(after.values())} operators are all needed")
        if gone := before - after:
            notes.append("removed " + ", ".join(f"{n} {op}" for op, n in sorted(gone.items())))
        for value in model.graph.all_nodes():
            value.metadata_props.clear()
        _save(model, path)
        return notes


def _operators(model: Any) -> Counter[str]:
    """How often each operator that costs something occurs."""
    return Counter(n.op_type for n in model.graph.all_nodes() if n.op_type not in FREE)


def _save(model: Any, path: Path) -> None:
    """Write one file, or two where the weights are too many for one; without shapes of inner values."""
    import onnx
    import onnx_ir as ir

    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if weights >= INLINE_BYTES else None)
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.value_info[:]
    onnx.save(proto, path)
    onnx.checker.check_model(str(path))
