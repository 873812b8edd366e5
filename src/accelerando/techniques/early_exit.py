"""An early exit: a small head half way, for the rows that are easy, and what comes after it for the others."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Stage, Technique
from accelerando.signature import Array, Port, Signature
from accelerando.techniques._exit_head import Head, attach, ending_of, learn, wanted_of
from accelerando.techniques._exits import Cut, Pool, choose, cuts_of, front_of, pools, rest_of, session
from accelerando.techniques._onnx_graph import MOST_BYTES, save
from accelerando.techniques._parity import batch
from accelerando.workload import Form, Model, Samples

PARTS = ("exit", "front", "rest")
LEAST_ROWS, MOST_ROWS, BATCH = 10, 8192, 64  # to learn from
SECONDS = 20.0  # for the rows' features


@dataclass(frozen=True)
class EarlyExit(Technique):
    """Answer from half way: the graph up to a cut, with a head of its own that is learned in seconds.

    It comes last, after quantizing, so a chain of blocks is cut whatever it was written in, and the head is learned
    from the very numbers that it will be given: the rows to learn from run through the graph once, and a logistic
    regression is fitted to the pooled state (Teerapittayanon et al., *BranchyNet*, 2016, whose side branches are
    trained with the body; here it stays as it is, so that the whole model's answer does too).

    Args:
        share: of the layers, the share that lies behind the exit.
        part: `exit` is a smaller model that answers as the whole does.  The other two are for a cascade whose second
            member goes on where the first one stopped: `front` is the exit, which gives its state besides, a port
            named `early_exit`; `rest` takes that state as one input more, and answers as the whole model.
    """

    share: float = 0.5
    part: str = "exit"

    takes: ClassVar[Form] = Form.ONNX
    gives: ClassVar[Form] = Form.ONNX
    stage: ClassVar[Stage] = Stage.PACK
    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "scipy", "threadpoolctl")
    wants: ClassVar[str] = "early exits"
    typical_seconds: ClassVar[float] = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie between 0 and 1, both excluded, but is {self.share!r}")
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, but is {self.part!r}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[EarlyExit]:
        return [cls(), cls(share=0.7), cls(share=0.3)]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        return _why_no_classes(model.signature) if model.form is Form.ONNX else None

    def apply(self, model: Model, data: Samples, folder: Path) -> Model:
        import onnx

        if refusal := _why_no_classes(model.signature):
            raise refusal
        graph = onnx.load(model.content)
        if graph.ByteSize() > MOST_BYTES:
            raise RefusalError(Reason.UNSUPPORTED, f"it has {graph.ByteSize():,} bytes, and 2 GiB is the most")
        cut, state = choose(graph, cuts_of(graph.graph), self.share, model.signature, data, self.name)
        where = f"early_exit: {cut.behind:.0%} of the layers lie behind {cut.tensor}, {state}"
        if self.part == "rest":
            signature = replace(model.signature, inputs=(*model.signature.inputs, state))
            made, log = rest_of(graph, cut, state), where
        else:
            head, rows = _learned(graph, cut, state, model, data)
            made = front_of(graph, cut, state)
            attach(made, head, state.name, graph.graph.output[0])
            signature, log = model.signature, f"{where}; learned from {rows} rows, wrong in {head.wrong:.1%} of others"
            if self.part == "front":
                signature = replace(signature, outputs=(*signature.outputs, state))
            else:
                del made.graph.output[1:]
        return replace(model.changed(Form.ONNX, save(made, folder), log), signature=signature)


def _learned(graph: Any, cut: Cut, state: Port, model: Model, data: Samples) -> tuple[Head, int]:
    """The head, learned from the training rows (where there are none, from the calibration split); and how many.

    Labels count where there are some and they are what answers are judged by, the whole model's answers elsewhere.
    """
    lessons = model.lessons
    rows = lessons.train if lessons is not None else data
    if len(rows) < LEAST_ROWS:
        raise RefusalError(
            Reason.UNSUPPORTED,
            f"there are {len(rows)} rows to learn a head from, and {LEAST_ROWS} are the least: pass train=, "
            "rows like those of data=; some thousands are good",
        )
    run = session(graph, [cut.tensor, graph.graph.output[0].name], model.signature)
    start = time.monotonic()
    first = next(rows.batches(BATCH))
    run(batch(model.signature, first.inputs, len(first)))
    each = (time.monotonic() - start) / len(first)
    rows = rows.take(int(np.clip(SECONDS / each, BATCH, MOST_ROWS)))
    judged = lessons is None or not lessons.metric.of_original
    features: dict[Pool, list[Array]] = {pool: [] for pool in pools(state.shape)}
    answers = []
    for chunk in rows.batches(model.signature.fixed_batch or BATCH):
        states, answer = (x[: len(chunk)] for x in run(batch(model.signature, chunk.inputs, len(chunk))))
        answers.append(answer)
        for pool, found in features.items():
            found.append(pool(states))
    whole = np.concatenate(answers)
    kept = {pool: np.concatenate(found) for pool, found in features.items()}
    if not all(np.isfinite(x).all() for x in (whole, *kept.values())):
        raise RefusalError(Reason.NOT_FINITE, f"{cut.tensor} or the answer, of the rows to learn from")
    wanted = wanted_of(whole, rows.targets if judged else None)
    return learn(kept, wanted, ending_of(whole)), len(whole)


def _why_no_classes(signature: Signature) -> RefusalError | None:
    """Why an exit can't answer in the model's place: it gives classes, and nothing else."""
    ports = signature.outputs
    classes = ports[0].shape[1] if len(ports[0].shape) == 2 else 0
    if len(ports) == 1 and ports[0].dtype == "float32" and isinstance(classes, int) and classes >= 2:
        return None
    return RefusalError(
        Reason.UNSUPPORTED,
        "an exit answers with one float32 output (batch, 2 or more classes), but the model with "
        + "; ".join(map(str, ports)),
    )
