"""A rung whose weights were disturbed after it was certified: how many audits until it is quarantined.

Noise is added to the matrices of its ONNX file, so much that it loses a given share of right answers.  A bundle has
three defences: the file's hash, stored answers that a rung must give when it is loaded, and the audits.  To see the
last one alone, hash and stored answers are renewed, as somebody would who does it on purpose.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from accelerando.bundle import Bundle
from accelerando.errors import BundleError
from accelerando.ladder import Ladder
from accelerando.recipe import Artifact
from accelerando.serve.governed import GovernedModel, govern
from benchmarks.figures import Figure, Found, fewer
from benchmarks.ladders import Ground, opened

NUMBER = 1  # of the rung: the best but for the original
LOSSES = {"grossly": 0.30, "subtly": 0.05}  # of right answers
MOST = 1000  # audited requests
CONTROL = 1000  # audited requests of the rung as it was certified
ROWS = 3000  # by which a loss is told
HALVINGS = 9
ASKED_AT_ONCE = 10
AUDIT_SECONDS = 20.0  # for those


def caught(ground: Ground) -> Found:
    """Each strength, and the rung as it was."""
    order = np.random.default_rng(0).permutation(len(ground.x))  # some stretches of the rows are easier than others
    ground = replace(ground, x=ground.x[order], y=ground.y[order])
    with tempfile.TemporaryDirectory() as name:
        found = Bundle.open(ground.path)
        rung = found.ladder[NUMBER]
        goal = f"speedup >= {rung.speedup.low * 0.9:.3f}"  # those below it are too slow, those above it less good
        before = right(found.folder(rung) / "model.onnx", ground)
        figures, lines = [_control(*audited(ground, found.path, goal, fewer(CONTROL, 100)))], []
        for strength, loss in LOSSES.items():
            bundle = Path(shutil.copytree(ground.path, Path(name) / strength))  # with the answers that were certified
            file = Bundle.open(bundle).folder(rung) / "model.onnx"
            disturb(file, ground, before - loss)
            after = right(file, ground)
            refused = [refusal(bundle, ground, goal)]
            renew(bundle, answers=False)
            refused.append(refusal(bundle, ground, goal))
            renew(bundle, answers=True)
            count, state, _ = audited(ground, bundle, goal, 2 * MOST)
            good = state == "quarantined" and count <= MOST
            words = f"after {count:,} audited requests" if state == "quarantined" else f"not within {count:,}"
            figures.append(
                Figure(f"a rung {strength} disturbed ({before - after:.1%} fewer right) is quarantined", words,
                       f"within {MOST:,}", good)
            )  # fmt: skip
            lines.append(f"{strength} (from {before:.2%} to {after:.2%} right): {' / '.join(refused)}")
    return Found(
        tuple(figures),
        f"Rung {NUMBER}, `{rung.recipe}`, certified at {rung.quality.mid:.2%}, its matrices disturbed by seeded noise. "
        "What became of it when the file alone was changed, and when its hash was renewed too: "
        f"{'; '.join(lines)}. Then the stored answers were renewed too, and every request audited against the best.",
    )


def _control(count: int, state: str, why: str) -> Figure:
    words = f"{state} after {count:,} audited requests" + (f": {why}" if why else "")
    return Figure("the rung as it was certified", words, "not quarantined", state == "ready")


# --- disturbing -------------------------------------------------------------------------------------------------------


def disturb(path: Path, ground: Ground, wanted: float) -> None:
    """Add so much noise to a file's matrices that this share of its answers is right; how much is found by halving."""
    content = path.read_bytes()
    low, high = 0.0, 2.0  # standard deviations of each matrix
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        path.write_bytes(noisy(content, middle))
        low, high = (low, middle) if right(path, ground) < wanted else (middle, high)
    path.write_bytes(noisy(content, high))


def noisy(content: bytes, strength: float) -> bytes:
    """An ONNX file with noise on its matrices, else the same to the byte."""
    import onnx
    from onnx import numpy_helper

    rng = np.random.default_rng(11)
    for tensor in onnx.load_from_string(content).graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim < 2 or weight.dtype.name not in ("int8", "uint8", "float32") or not tensor.raw_data:
            continue
        changed = weight + rng.standard_normal(weight.shape) * strength * weight.std()
        if weight.dtype.kind != "f":
            bounds = np.iinfo(weight.dtype)
            changed = np.clip(np.rint(changed), bounds.min, bounds.max)
        content = content.replace(tensor.raw_data, changed.astype(weight.dtype).tobytes(), 1)
    return content


def right(path: Path, ground: Ground) -> float:
    """The share of right answers that a file gives by itself, whatever the manifest says of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, x = session.get_inputs()[0].name, ground.x[:ROWS]
    chosen = [session.run(None, {name: x[i : i + 64]})[0].argmax(axis=1) for i in range(0, len(x), 64)]
    return float((np.concatenate(chosen) == ground.y[:ROWS]).mean())


def renew(path: Path, answers: bool) -> None:
    """Make the manifest describe the rung's file as it is by now; with `answers`, the stored ones too."""
    bundle = Bundle.open(path, hashes=False)
    rungs, parity = list(bundle.ladder), bundle.parity
    rung = rungs[NUMBER] = replace(rungs[NUMBER], artifact=Artifact.gather(bundle.folder(rungs[NUMBER])))
    if answers and parity is not None:
        with closing(bundle.start(rung)) as runner:
            now = tuple(runner(list(parity.inputs)))
        parity = replace(parity, rungs={**parity.rungs, rung.recipe.key: now})
    Bundle.write(
        path, goal=bundle.goal, verdict=bundle.verdict, best=bundle.best, ladder=Ladder(tuple(rungs)),
        signature=bundle.signature, machine=bundle.machine, workload=bundle.workload, run=bundle.run,
        profile=bundle.profile, parity=parity,
    )  # fmt: skip


# --- auditing ---------------------------------------------------------------------------------------------------------


def refusal(bundle: Path, ground: Ground, goal: str) -> str:
    """What becomes of the rung when the bundle is loaded, in words."""
    try:
        with govern(bundle, goal=goal, audit=0.0, model=ground.model) as model:
            rung = model.status().rungs[NUMBER]
    except BundleError as error:
        return f"the bundle is refused: {error}"
    return f"{rung.state}: {rung.why}" if rung.why else rung.state


def audited(ground: Ground, bundle: Path, goal: str, most: int) -> tuple[int, str, str]:
    """Requests of which all are audited, until the rung is quarantined: how many, what became of it, and why.

    Raises:
        RuntimeError: the audits do not go on.
    """
    asked = 0
    with opened(bundle, goal, "balanced", 1.0, ground.model) as model:
        while True:
            told = model.status()
            rung = told.rungs[NUMBER]
            if rung.state != "ready" or told.audited >= most:
                return told.audited, rung.state, rung.why
            for _ in range(ASKED_AT_ONCE):
                model(ground.x[asked % len(ground.x)][None])
                asked += 1
            _wait_for_audits(model, asked)


def _wait_for_audits(model: GovernedModel, asked: int) -> None:
    """Until all that was asked is audited, for audits are done when nothing else is to be done."""
    until = time.monotonic() + AUDIT_SECONDS
    while (told := model.status()).audited < asked and told.rungs[NUMBER].state == "ready":
        if time.monotonic() > until:
            raise RuntimeError(f"{told.audited} of {asked} requests were audited within {AUDIT_SECONDS:g} s")
        time.sleep(0.002)
