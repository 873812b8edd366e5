"""Every attack is refused by its own code, and `docs/format.md`, the source and the attacks name the same codes."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelerando.bundle import Bundle
from accelerando.errors import BundleError
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fakes_known

from . import on_company, on_figures, on_files, on_text, on_use
from .making import ATTACKS, Attack, loads, opens, reads_trials, verifies

FAMILIES = (on_text, on_files, on_figures, on_company, on_use)  # importing them registered their attacks

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("good") / "bundle"
    with fakes_known():
        write_bundle(path)
        yield path


def test_the_bundle_they_are_made_from_is_good(good: Path) -> None:
    for door in (opens, reads_trials, verifies, loads):
        door(good)
    Bundle.open(good).check_workload("0123456789abcdef")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_it_is_refused_by_name(attack: Attack, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(good, path)
    attack.make(path)
    with pytest.raises(BundleError) as caught:
        attack.door(path)
    assert caught.value.code == attack.code, caught.value
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)
    assert "pwned" not in capfd.readouterr().out


def test_the_readme_lists_every_attack_and_no_other() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([a-z-]+)` \|", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    families = [family.__name__.rpartition(".")[2] for family in FAMILIES]
    ordered = sorted(ATTACKS, key=lambda a: families.index(a.make.__module__.rpartition(".")[2]))
    assert rows == [(a.name, a.code) for a in ordered]
    assert len(rows) >= 20


def test_every_code_is_in_the_page_in_the_source_and_attacked() -> None:
    page = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    table = page.partition("## Error codes")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE))
    assert set(re.findall(r"\[`([a-z-]+)`\]", page)) <= documented
    assert codes_raised() == documented
    assert {a.code for a in ATTACKS} == documented


def codes_raised() -> set[str]:
    """Every code with which the source makes a BundleError or a failed Finding, and those handed to `read_file`."""
    found: set[str] = set()
    for file in (ROOT / "src" / "accelerando").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            place = {"BundleError": 0, "Finding": 2, "read_file": 3, "_size": 1}.get(name)
            if place is not None and len(node.args) > place and isinstance(node.args[place], ast.Constant):
                found.add(node.args[place].value)
    return found
