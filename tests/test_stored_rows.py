"""The stored rows: a file that was changed a little is seen where it was certified, and an untouched one never is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import Script, ScriptedRunner

from accelerando.backends.onnxruntime import Onnxruntime
from accelerando.backends.openvino import Openvino
from accelerando.bundle import Bundle
from accelerando.goal import Goal
from accelerando.machine import Machine
from accelerando.parity import Parity
from accelerando.recipe import Backend, Recipe
from accelerando.serve.aims import Aims
from accelerando.serve.company import Company
from accelerando.serve.residents import Residents
from accelerando.serve.stored_rows import StoredRows
from accelerando.serve.watch import Watch
from accelerando.signature import Array, Port
from accelerando.testing.bundles import SIGNATURE, write_bundle

onnx = pytest.importorskip("onnx")
WIDE = replace(
    SIGNATURE, inputs=(Port("x", "float32", ("batch", 64)),), outputs=(Port("logits", "float32", ("batch", 10)),)
)
ROWS = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
KNOBS = [Onnxruntime(threads=t, batch=b) for t in (0, 1, 2) for b in (0, 1)] + [
    Onnxruntime(optimization="extended"), Onnxruntime(arena=False), Onnxruntime(spinning=False),
]  # fmt: skip
OPENVINO = [Openvino(threads=t, batch=b) for t in (0, 1, 2) for b in (0, 1)] + [
    Openvino(streams=2), Openvino(hint="throughput"),
    *(Openvino(precision="bf16", batch=b) for b in (0, 1) if Machine.look().bf16),
]  # fmt: skip


@cache
def weights() -> tuple[Array, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(shape).astype(np.float32) / 8 for shape in ((64, 96), (96, 10)))


def disturbed(share: float) -> tuple[Array, ...]:
    rng = np.random.default_rng(2)
    return tuple((w + share * w.std() * rng.standard_normal(w.shape)).astype(np.float32) for w in weights())


def save(of: Sequence[Array], folder: Path, eight_bits: bool = False) -> Path:
    """Two products: in float32, or with weights and activations of 8 bits, their ranges found at each call."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["logits"]),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k]) for n, k in (("x", 64), ("logits", 10))]
    tensors = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(of)]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:], tensors)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    if not eight_bits:
        return path
    from onnxruntime.quantization import quantize_dynamic

    target = folder / "eight" / "model.onnx"
    target.parent.mkdir(exist_ok=True)
    quantize_dynamic(path, target, per_channel=True)
    return target


def best_answers(x: Array) -> Array:
    return np.maximum(x @ weights()[0], 0) @ weights()[1]


def bundle_of(
    path: Path, content: Path, backends: Sequence[Backend], parity: Parity | None = None, **more: Any
) -> Bundle:
    """A bundle whose original answered quite otherwise than its rungs do, so that the wide bound allows much."""
    recipes = [Recipe((), backend) for backend in backends]
    given: dict[str, Any] = {**more, **({"parity": parity} if parity else {})}
    bundle = write_bundle(path, recipes=recipes, content=content, signature=WIDE, inputs=[ROWS], **given)
    if parity:
        return bundle
    assert bundle.parity is not None
    original = (bundle.parity.original[0] + np.float32(0.8) * np.abs(bundle.parity.original[0]).max(),)
    return bundle_of(path.with_name("certified"), content, backends, replace(bundle.parity, original=original), **more)


def became(bundle: Bundle) -> list[tuple[str, str]]:
    """State and reason of every rung, loaded as a server loads it."""
    residents = Residents(bundle, lambda rung: bundle.start(rung, spinning=False), threading.Lock(), most_rows=4)
    for number in range(len(bundle.ladder)):
        residents.load(number)
    found = [(r.state, r.why) for r in residents]
    residents.close()
    return found


@pytest.mark.parametrize(
    ("backends", "eight_bits"),
    [(KNOBS, False), (KNOBS, True), pytest.param(OPENVINO, False, marks=pytest.mark.slow)],
    ids=["onnxruntime", "onnxruntime-8-bits", "openvino"],
)
def test_a_little_changed_file_is_seen_and_an_untouched_one_is_not(
    tmp_path: Path, backends: list[Backend], eight_bits: bool
) -> None:
    if backends is OPENVINO:
        pytest.importorskip("openvino")
    good = bundle_of(tmp_path / "b", save(weights(), tmp_path / "good", eight_bits), backends)
    assert {state for state, _ in became(good)} == {"ready"}
    bad = bundle_of(tmp_path / "bad", save(disturbed(0.15), tmp_path / "m", eight_bits), backends, good.parity)
    for state, why in became(Bundle.open(bad.path)):  # its hashes are those of the changed file
        assert state == "failed"
        assert "by the versions, that stored it" in why


def test_verify_finds_a_little_changed_file_where_it_was_certified_and_nothing_in_an_untouched_one(
    tmp_path: Path,
) -> None:
    good = bundle_of(tmp_path / "b", save(weights(), tmp_path / "good", eight_bits=True), KNOBS)
    assert all(finding.passed for finding in good.verify())
    model = save(disturbed(0.15), tmp_path / "m", eight_bits=True)
    bad = Bundle.open(bundle_of(tmp_path / "bad", model, KNOBS, good.parity).path)  # its hashes are the new file's
    wrong = [finding for finding in bad.verify() if not finding.good]
    assert [finding.code for finding in wrong] == ["differs"] * len(KNOBS)
    assert all("by the versions, that stored it" in finding.detail for finding in wrong)


def test_verify_allows_elsewhere_what_rounding_may_change(tmp_path: Path) -> None:
    model = save(disturbed(0.15), tmp_path / "m")
    parity = bundle_of(tmp_path / "b", save(weights(), tmp_path / "good"), KNOBS[:1]).parity
    moved = bundle_of(tmp_path / "bad", model, KNOBS[:1], parity, machine=replace(Machine.look(), cpu="another"))
    assert all(finding.passed for finding in moved.verify())


def test_that_change_is_subtle() -> None:
    x = np.random.default_rng(3).standard_normal((5000, 64)).astype(np.float32)
    w0, w1 = disturbed(0.15)
    alike = (np.maximum(x @ w0, 0) @ w1).argmax(1) == best_answers(x).argmax(1)
    assert 0.8 < alike.mean() < 0.97


def test_elsewhere_the_wide_bound_holds(tmp_path: Path) -> None:
    here = Machine.look()
    good = bundle_of(tmp_path / "b", save(weights(), tmp_path / "good"), KNOBS[:1])
    assert good.parity is not None
    key, stored = good.ladder[0].recipe.key, good.parity.rungs[good.ladder[0].recipe.key][0]
    moved = [stored + np.float32(0.03) * np.abs(stored).max()]
    for machine in (
        replace(here, cores=here.cores + 1),
        replace(here, cpu="another"),
        replace(here, versions=(*here.versions[:-1], (here.versions[-1][0], "0.0"))),
    ):
        assert StoredRows(good, machine).deviation(key, moved) is None
        assert StoredRows(good, machine).deviation(key, [stored * 3]) is not None
    assert "allowed" in str(StoredRows(good, here).deviation(key, moved))
    assert StoredRows(good, here).deviation(key, [stored + np.float32(0.01) * np.abs(stored).max()]) is None


def test_answers_that_were_never_stored_prove_nothing(tmp_path: Path) -> None:
    good = bundle_of(tmp_path / "b", save(weights(), tmp_path / "good"), KNOBS[:1])
    assert StoredRows(good).deviation("0" * 12, [ROWS]) == "none of its answers were stored"


def test_an_audit_asks_them_as_they_were_asked_when_they_were_stored(tmp_path: Path) -> None:
    """In one call, however few rows a batch may have: 8-bit ranges found at each call depend on all its rows."""
    bundle, cores = write_bundle(tmp_path / "b"), threading.Lock()
    scripts = [Script() for _ in bundle.ladder]
    numbers = {rung.recipe.key: number for number, rung in enumerate(bundle.ladder)}
    residents = Residents(bundle, lambda rung: ScriptedRunner(scripts[numbers[rung.recipe.key]]), cores, most_rows=2)
    residents.begin((0, 1), first=2)
    watch = Watch(bundle, share=1.0)
    company = Company(residents, Aims.of(Goal.parse("p99 <= 30s"), bundle.ladder), watch, None, 1)
    best = company.best()
    assert best is not None
    other = next(number for number in (0, 1) if number != best.number)
    row = [np.ones((1, 4), np.float32)]
    watch.add(row, ScriptedRunner(Script())(row), other)
    scripts[other].calls.clear()
    company.audit(cores)
    assert watch.audited == 1
    assert scripts[other].calls == [4]
    residents.close()
