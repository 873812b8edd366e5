"""A shelf that watches its folders: a bundle that can't be loaded is tried again, and says meanwhile why."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from accelerando.errors import BundleError
from accelerando.serve.governed import GovernedModel, govern
from accelerando.server import shelf as shelf_module
from accelerando.server.shelf import Shelf
from accelerando.testing.bundles import write_bundle
from accelerando.testing.fakes import fake_recipe, fakes_known


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shelf_module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(shelf_module, "TRIES", 3)
    with fakes_known():
        yield


class Clumsy:
    """A model that goes over to another bundle at the given try; `tries` counts them."""

    def __init__(self, fails: int) -> None:
        self.fails, self.tries, self.version, self.ready = fails, 0, 1, True

    def update(self, path: Path) -> None:
        self.tries += 1
        if self.tries <= self.fails:
            raise BundleError("load", f"try {self.tries} failed")
        self.version += 1

    def close(self) -> None:
        self.ready = False


def until(holds: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def watched(folder: Path, model: Clumsy) -> Shelf:
    folder.mkdir()
    (folder / "manifest.json").write_text("one")
    made: Any = lambda name, path: model  # noqa: E731
    return Shelf({"m": folder}, made, watched=True)


def why(shelf: Shelf) -> str:
    (entry,) = shelf.index()
    assert entry.state == "READY", "the old one goes on"
    return entry.reason


def test_a_manifest_that_comes_before_its_files_takes_over_when_they_have_come(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    write_bundle(tmp_path / "newer", recipes=[fake_recipe(0), fake_recipe(2, strengths=(1,))])

    def made(name: str, path: Path) -> GovernedModel:
        return govern(path, goal="p99 <= 30s", audit=0, name=name)

    shelf = Shelf({"m": tmp_path / "b"}, made, watched=True)
    try:
        shutil.copy(tmp_path / "newer" / "manifest.json", tmp_path / "b" / "manifest.json")
        until(lambda: "could not be loaded anew" in why(shelf))
        assert "tried again" in why(shelf)
        shutil.copytree(tmp_path / "newer", tmp_path / "b", dirs_exist_ok=True)
        until(lambda: shelf.versions("m") == ("2",))
        until(lambda: why(shelf) == "")
    finally:
        shelf.close()


def test_what_fails_for_a_reason_of_its_own_is_tried_again_with_nothing_changed(tmp_path: Path) -> None:
    model = Clumsy(fails=2)
    shelf = watched(tmp_path / "b", model)
    try:
        (tmp_path / "b" / "manifest.json").write_text("another")
        until(lambda: model.version == 2)
        until(lambda: why(shelf) == "")
        assert model.tries == 3
    finally:
        shelf.close()


def test_it_gives_up_after_some_tries_until_a_file_changes(tmp_path: Path) -> None:
    model = Clumsy(fails=4)
    shelf = watched(tmp_path / "b", model)
    try:
        (tmp_path / "b" / "manifest.json").write_text("another")
        until(lambda: "try 3 failed (it is tried again when its files change)" in why(shelf))
        time.sleep(0.3)  # a dozen looks
        assert model.tries == 3
        (tmp_path / "b" / "rungs").mkdir()
        (tmp_path / "b" / "rungs" / "model.bin").write_bytes(b"1")
        until(lambda: model.version == 2)
        assert model.tries == 5
    finally:
        shelf.close()


def test_an_error_that_is_not_ours_does_not_end_the_watch(tmp_path: Path) -> None:
    class Crashing(Clumsy):
        def update(self, path: Path) -> None:
            if not self.tries:
                self.tries += 1
                raise OSError("the disk is gone")
            super().update(path)

    model = Crashing(fails=0)
    shelf = watched(tmp_path / "b", model)
    try:
        (tmp_path / "b" / "manifest.json").write_text("another")
        until(lambda: model.version == 2)
    finally:
        shelf.close()
