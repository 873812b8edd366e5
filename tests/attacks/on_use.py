"""Attacks that show only when a bundle is used: loading, resuming, writing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accelerando.backends.cascade import Cascade
from accelerando.bundle import Bundle
from accelerando.plugins import find
from accelerando.recipe import File, Recipe, key_of
from accelerando.workload import Form, Model

from .making import (
    attack,
    edit,
    loads,
)


def loads_without_fakes(path: Path) -> None:
    shelved = {name: sys.modules.pop(name) for name in list(sys.modules) if name.endswith(".fake_backend")}
    find.cache_clear()
    try:
        loads(path)
    finally:
        sys.modules.update(shelved)
        find.cache_clear()


@attack("no-rung", loads_without_fakes)
def backends_that_are_not_installed(path: Path) -> None:
    assert path.is_dir()  # nothing is wrong with it, but nothing in it can run here


@attack("load", loads)
def a_model_that_its_backend_can_not_read(path: Path) -> None:
    """Rubbish with hashes that fit, under the name of a real backend."""
    backend = find("backends", "onnxruntime")()
    recipe = {"steps": [], "backend": backend.to_json()}
    key = key_of(recipe)
    folder = path / "rungs" / key
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"rubbish" * 100)
    file = File.of(folder / "model.onnx", folder)

    def change(data: dict[str, Any]) -> None:
        data["rungs"][1].update(recipe=recipe, key=key, text=["onnxruntime"], files=[vars(file)])
        data["best"] = key

    edit(path, change)


def a_cascade(path: Path, rewrite: Callable[[bytes], bytes]) -> None:
    """A cascade as the best rung, whose only file is its `cascade.json`, with hashes and a seal that fit."""
    plain = [Recipe((), find("backends", "onnxruntime")(threads=n)) for n in (1, 2)]
    recipe = Recipe((), Cascade.of(*plain, "margin", 0.9))
    folder = path / "rungs" / recipe.key
    folder.mkdir()
    recipe.backend.compile(Model(Form.ONNX, None, Bundle.open(path, hashes=False).signature), folder)
    record = folder / "cascade.json"
    record.write_bytes(rewrite(record.read_bytes()))
    files = [vars(File.of(record, folder))]
    rung = {"recipe": recipe.to_json(), "key": recipe.key, "text": [str(recipe)], "files": files}
    edit(path, lambda data: (data["rungs"][1].update(rung), data.update(best=recipe.key)))


@attack("load", loads)
def a_cascade_that_was_made_less_careful(path: Path) -> None:
    a_cascade(path, lambda text: text.replace(b"0.9", b"0.1"))


@attack("load", loads)
def a_cascade_without_its_members(path: Path) -> None:
    a_cascade(path, lambda text: text)


@attack("other-model", lambda path: Bundle.open(path).check_workload("f" * 16))
def a_bundle_of_another_model(path: Path) -> None:
    assert path.is_dir()


def writes_onto_a_full_disk(path: Path) -> None:
    resource = pytest.importorskip("resource")
    bundle = Bundle.open(path)
    before = (path / "manifest.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond a page
        Bundle.write(
            path, goal=bundle.goal, verdict=bundle.verdict, best=0, ladder=bundle.ladder,
            signature=bundle.signature, machine=bundle.machine, workload=bundle.workload, run=bundle.run,
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (path / "manifest.json").read_bytes() == before
        assert not list(path.glob(".*.tmp"))
        Bundle.open(path)


@attack("no-room", writes_onto_a_full_disk)
def a_disk_that_is_full(path: Path) -> None:
    assert path.is_dir()
