from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accelerando import manifest, parity
from accelerando.bundle import Bundle
from accelerando.errors import BundleError, MissingExtraError
from accelerando.goal import Bound, Check, Outcome, Verdict
from accelerando.interval import Interval
from accelerando.ladder import Ladder
from accelerando.parity import Parity
from accelerando.plugins import StoredBackend, StoredTechnique, find, recipe_from_json, stored_recipe
from accelerando.recipe import Recipe
from accelerando.strict_json import canonical, parse
from accelerando.testing.bundles import RUN, SIGNATURE, WORKLOAD, write_bundle
from accelerando.testing.fakes import FakeBackend, FakeTechnique, fake_recipe, fakes_known

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with fakes_known():
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, known: None) -> Path:
    path = tmp_path_factory.mktemp("template") / "bundle"
    write_bundle(path)
    return path


@pytest.fixture
def path(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "bundle"))


def rewrite(bundle: Bundle, **changed: Any) -> Bundle:
    """Write a bundle again, with what it holds, but for what is changed."""
    names = ("goal", "verdict", "best", "ladder", "signature", "machine", "workload", "run", "profile", "parity")
    return Bundle.write(bundle.path, **{**{n: getattr(bundle, n) for n in names}, **changed})


# --- what is written is what is read ----------------------------------------------------------------------------


def test_everything_comes_back(tmp_path: Path) -> None:
    wrote = write_bundle(tmp_path / "b")
    read = Bundle.open(tmp_path / "b")
    for name in ("path", "goal", "verdict", "best", "signature", "machine", "workload", "run", "profile", "created"):
        assert getattr(read, name) == getattr(wrote, name), name
    assert read.workload == WORKLOAD
    assert read.run == RUN
    for ours, theirs in zip(read.ladder.rungs, wrote.ladder.rungs, strict=True):
        assert ours.recipe == theirs.recipe
        assert ours.artifact == theirs.artifact
        assert ours.certified == theirs.certified
        assert ours.evidence.summary() == theirs.evidence.summary()
    assert [str(r.recipe) for r in read.ladder.rungs] == [
        "fake_backend",
        "fake_backend(level=1)",
        "fake_technique(strength=3) > fake_backend(level=2)",
    ]
    assert [t.recipe.key for t in read.trials] == [r.recipe.key for r in read.ladder.rungs]
    assert read.parity is not None
    assert np.array_equal(read.parity.inputs[0], np.random.default_rng(0).standard_normal((4, 4), np.float32))


def test_the_manifest_can_be_read_by_a_person(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    assert data["goal"]["text"] == "speedup >= 2, drop <= 5%"
    assert data["verdict"]["outcome"] == "met"
    assert data["rungs"][2]["text"] == ["fake_technique(strength=3)", "fake_backend(level=2)"]
    assert data["rungs"][2]["summary"]["speedup"]["mid"] == pytest.approx(5, rel=0.1)


@given(level=st.integers(), strengths=st.lists(st.integers(), max_size=4))
def test_a_recipe_read_from_a_bundle_equals_the_real_one(level: int, strengths: list[int]) -> None:
    real = fake_recipe(level, strengths)
    data = json.loads(json.dumps(real.to_json()))
    stored = stored_recipe(data, [str(part) for part in (*real.steps, real.backend)])
    assert stored == real == recipe_from_json(data)
    assert len({stored, real}) == 1
    assert str(stored) == str(real)
    assert stored.to_json() == real.to_json()
    assert all(isinstance(step, StoredTechnique) for step in stored.steps)
    assert isinstance(stored.backend, FakeBackend)
    assert stored != fake_recipe(level, [*strengths, 1])


def test_a_backend_that_is_not_installed_leaves_the_other_rungs_usable(path: Path) -> None:
    def rename(data: dict[str, Any]) -> None:
        data["rungs"][1]["recipe"]["backend"]["name"] = "tomorrow"
        data["rungs"][1]["key"] = key = manifest.key_of(data["rungs"][1]["recipe"])
        (path / "rungs" / key).mkdir()
        shutil.copy(next((path / "rungs").glob("*/fake.json")), path / "rungs" / key / "fake.json")
        data["rungs"][1]["files"] = manifest.Artifact.gather(path / "rungs" / key).to_json()

    reseal(path, rename)
    bundle = Bundle.open(path)
    assert isinstance(bundle.ladder.rungs[1].recipe.backend, StoredBackend)
    with pytest.raises(MissingExtraError, match="no 'tomorrow' among the backends"):
        bundle.start(bundle.ladder.rungs[1])
    assert bundle.start(bundle.ladder.rungs[2])


def test_an_infinite_bound_survives(path: Path) -> None:
    check = Check(Bound("speedup", True, 2.0), Interval(1.0, 5.0, math.inf), Outcome.UNSURE, math.inf, "too few")
    rewrite(Bundle.open(path), verdict=Verdict(Outcome.UNSURE, (check,)))
    assert Bundle.open(path).verdict.checks == (check,)


def test_a_librarys_words_lose_their_control_characters(path: Path) -> None:
    rewrite(Bundle.open(path), workload={**WORKLOAD, "notes": ["\x1b[31mred\x1b[0m", "two\nlines"]})
    assert Bundle.open(path).workload["notes"] == ["\ufffd[31mred\ufffd[0m", "two\nlines"]


def test_a_writer_is_told_at_once_what_a_reader_would_refuse(path: Path) -> None:
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=r"manifest\.run\.trials must be a whole number, but is 'many'"):
        rewrite(Bundle.open(path), run={**RUN, "trials": "many"})
    assert (path / "manifest.json").read_bytes() == before


# --- writing over a former one ----------------------------------------------------------------------------------


def test_what_only_the_former_needed_goes_and_the_rest_stays(path: Path) -> None:
    bundle = Bundle.open(path)
    (path / "rungs" / "my notes").mkdir()
    (path / "report.html").write_text("mine")
    (path / "work").mkdir()
    kept = (bundle.ladder.rungs[0], bundle.ladder.rungs[2])
    rewrite(bundle, ladder=Ladder(kept), best=1, profile={"other": 1}, parity=None)
    assert sorted(p.name for p in (path / "rungs").iterdir()) == sorted(["my notes", *(r.recipe.key for r in kept)])
    assert len(list(path.glob("profile-*"))) == 1
    assert not list(path.glob("parity-*"))
    assert (path / "report.html").exists()
    assert (path / "work").exists()
    assert Bundle.open(path).profile == {"other": 1}
    assert Bundle.open(path).best == 1


def test_a_rung_that_is_not_in_its_place_leaves_the_former_whole(path: Path) -> None:
    bundle = Bundle.open(path)
    missing = dataclasses.replace(bundle.ladder.rungs[2], recipe=fake_recipe(9))
    with pytest.raises(BundleError) as caught:
        rewrite(bundle, ladder=Ladder((*bundle.ladder.rungs, missing)))
    assert caught.value.code == "missing-file"
    assert all(f.passed for f in Bundle.open(path).verify())


def test_between_any_two_steps_of_writing_there_is_a_whole_bundle(path: Path, monkeypatch: Any) -> None:
    """Die at each rename in turn: what is there must open and be proven, the former or the new."""
    import accelerando.bundle

    real, count = accelerando.bundle.write_file, 0
    for last in range(3):
        count = 0

        def dying(file: Path, content: bytes, last: int = last) -> None:
            nonlocal count
            if count == last:
                raise KeyboardInterrupt
            count += 1
            real(file, content)

        monkeypatch.setattr(accelerando.bundle, "write_file", dying)
        bundle = Bundle.open(path)
        assert bundle.parity is not None
        changed = Parity(tuple(x + 1 for x in bundle.parity.inputs), bundle.parity.original, bundle.parity.rungs)
        with pytest.raises(KeyboardInterrupt):
            rewrite(bundle, profile={"step": last}, parity=changed)
        assert all(f.passed for f in Bundle.open(path).verify())
    monkeypatch.setattr(accelerando.bundle, "write_file", real)
    rewrite(Bundle.open(path))
    assert len(list(path.glob("pa*-*"))) == 1  # what the dead left behind is swept up


# --- looking at it ----------------------------------------------------------------------------------------------


def test_verify_says_what_it_looked_at(path: Path) -> None:
    found = Bundle.open(path).verify()
    assert [f.subject.partition(",")[0] for f in found] == [
        "verdict",
        "parity",
        *(f"rung {i}" for i in (0, 0, 1, 1, 2, 2)),
    ]
    assert all(f.passed and f.good for f in found)
    assert str(found[2]) == "passed: rung 0, fake_backend: files and figures"


def test_a_quick_look_does_not_hash_but_starting_does(path: Path) -> None:
    bundle = Bundle.open(path)
    file = bundle.folder(bundle.ladder.rungs[1]) / "fake.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    quick = Bundle.open(path, hashes=False)
    with pytest.raises(BundleError, match="hash"):
        quick.start(quick.ladder.rungs[1])
    (damaged,) = [f for f in quick.verify() if not f.good]
    assert damaged.code == "hash"
    assert str(damaged).startswith("FAILED: rung 1, fake_backend(level=1): [hash] ")


def test_another_machine_is_told_apart(path: Path) -> None:
    bundle = Bundle.open(path)
    assert bundle.differences() == ()
    assert rewrite(bundle, machine=dataclasses.replace(bundle.machine, cpu="another")).differences() == (
        f"cpu: {bundle.machine.cpu}, was another",
    )


def test_a_torn_last_line_is_passed_over(path: Path) -> None:
    journal = path / "trials.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    assert len(Bundle.open(path).trials) == 2
    journal.unlink()
    assert Bundle.open(path).trials == ()


def test_a_trial_of_a_technique_that_is_gone_is_kept_by_name(path: Path) -> None:
    journal = path / "trials.jsonl"
    journal.write_text(journal.read_text().replace("fake_technique", "forgotten"))
    assert str(Bundle.open(path).trials[2].recipe) == "forgotten(strength=3, refused=False) > fake_backend(level=2)"
    assert isinstance(Recipe((FakeTechnique(),), FakeBackend()).steps[0], find("techniques", "fake_technique"))


# --- parity -----------------------------------------------------------------------------------------------------


def answers(stored: Any, original: Any) -> Parity:
    return Parity((np.zeros(1),), (np.asarray(original),), {"0" * 12: (np.asarray(stored),)})


def test_floats_may_move_a_little_or_by_half_of_what_the_rung_itself_moved() -> None:
    exact, lossy = answers([1.0, 2.0], [1.0, 2.0]), answers([1.0, 2.0], [1.4, 2.0])
    key = "0" * 12
    assert exact.deviation(key, [np.array([1.0, 2.001])]) is None
    assert "differs by up to 0.1" in str(exact.deviation(key, [np.array([1.0, 2.1])]))
    assert lossy.deviation(key, [np.array([1.0, 2.1])]) is None
    assert lossy.deviation(key, [np.array([1.0, 2.3])]) is not None
    assert exact.deviation(key, [np.array([math.nan, 2.0])]) is not None
    assert exact.deviation(key, [np.array([1.0, 2.0], np.float32)]) is not None
    assert exact.deviation(key, []) is not None


def test_whole_numbers_may_not_move_at_all_unless_the_rungs_did() -> None:
    key = "0" * 12
    assert answers([500, 7], [500, 7]).deviation(key, [np.array([501, 7])]) is not None
    assert answers([500, 7], [501, 7]).deviation(key, [np.array([501, 7])]) is None


def test_sabotage_a_parity_that_allows_everything_is_seen_by_the_attack(path: Path, monkeypatch: Any) -> None:
    bundle = Bundle.open(path)
    assert bundle.parity is not None
    wrong = {k: tuple(x + 1 for x in v) for k, v in bundle.parity.rungs.items()}
    bundle = rewrite(bundle, parity=Parity(bundle.parity.inputs, next(iter(wrong.values())), wrong))
    assert [f.code for f in bundle.verify() if f.passed is False] == ["differs"] * 3
    monkeypatch.setattr(parity, "SLACK", math.inf)
    monkeypatch.setattr(parity, "AT_HOME", math.inf)
    assert all(f.passed for f in bundle.verify())


# --- whatever it is fed, it answers by name ---------------------------------------------------------------------


def reseal(path: Path, change: Any) -> None:
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    data["seal"] = manifest.seal(data)
    (path / "manifest.json").write_text(json.dumps(data))


@QUICK
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_the_manifest_goes_unseen(template: Path, where: float, bit: int) -> None:
    content = bytearray((template / "manifest.json").read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    try:
        data = manifest.unseal(bytes(content))
    except BundleError:
        return
    assert data == json.loads((template / "manifest.json").read_text())  # such as 1e-05 and 1E-05


@QUICK
@given(data=st.data())
def test_no_junk_in_any_field_raises_anything_but_a_bundle_error(template: Path, data: st.DataObject) -> None:
    found = json.loads((template / "manifest.json").read_text())
    node, depth = found, data.draw(st.integers(1, 6))
    for _ in range(depth):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(node[key], (dict, list)) or not node[key]:
            break
        parent, node = node, node[key]
    else:
        node, key = parent, key
    node[key] = data.draw(JUNK)
    found["seal"] = manifest.seal(found)
    try:
        bundle = Bundle._of(template, manifest.unseal(json.dumps(found).encode()))
    except BundleError:
        return
    assert bundle.ladder.rungs
    assert repr(bundle.signature)


@given(JUNK)
def test_canonical_json_is_read_back_and_does_not_depend_on_order(value: Any) -> None:
    text = canonical(value)
    assert parse(text, "junk") == value
    if isinstance(value, dict):
        assert canonical(dict(reversed(value.items()))) == text


def test_the_signature_of_the_fake_is_what_it_says() -> None:
    assert manifest.signature_from_json(SIGNATURE.to_json()) == SIGNATURE
