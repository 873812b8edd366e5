"""Attacks on paths, links and files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .making import (
    artifact,
    attack,
    edit,
    edit_file,
)


@attack("path")
def an_absolute_path(path: Path) -> None:
    edit_file(path, path="/etc/hostname")


@attack("path")
def a_path_that_climbs_out(path: Path) -> None:
    edit_file(path, path="../../manifest.json")


@attack("path")
def a_path_that_climbs_out_in_the_middle(path: Path) -> None:
    edit_file(path, path="a/../../../manifest.json")


@attack("path")
def a_backslash(path: Path) -> None:
    edit_file(path, path="..\\..\\manifest.json")


@attack("path")
def a_drive_letter(path: Path) -> None:
    edit_file(path, path="C:model.onnx")


@attack("path")
def a_device_of_windows(path: Path) -> None:
    edit_file(path, path="weights/NUL.bin")


@attack("path")
def one_file_under_two_spellings(path: Path) -> None:
    edit(path, lambda data: data["rungs"][1]["files"].append({**data["rungs"][1]["files"][0], "path": "FAKE.json"}))


@attack("path")
def a_parity_file_from_elsewhere(path: Path) -> None:
    edit(path, lambda data: data["parity"].update(path="../parity.npz"))


@attack("link")
def a_link_to_a_file_outside(path: Path) -> None:
    file = artifact(path)
    outside = path.parent / "outside.json"
    outside.write_bytes(file.read_bytes())  # the right content does not make it right
    file.unlink()
    file.symlink_to(outside)


@attack("link")
def a_rung_that_lies_outside(path: Path) -> None:
    folder = artifact(path).parent
    folder.rename(path.parent / "outside")
    folder.symlink_to(path.parent / "outside")


@attack("link")
def a_manifest_that_lies_outside(path: Path) -> None:
    (path / "manifest.json").rename(path.parent / "outside.json")
    (path / "manifest.json").symlink_to(path.parent / "outside.json")


@attack("link")
def links_in_a_circle(path: Path) -> None:
    file = artifact(path)
    file.unlink()
    file.symlink_to(file.with_name("other"))
    file.with_name("other").symlink_to(file)


@attack("link")
def a_folder_linked_beside_the_model(path: Path) -> None:
    (path.parent / "outside").mkdir()
    (artifact(path).parent / "weights").symlink_to(path.parent / "outside")


@attack("not-a-file")
def a_pipe_that_never_answers(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    file = artifact(path)
    file.unlink()
    os.mkfifo(file)


@attack("not-a-file")
def a_folder_in_place_of_the_model(path: Path) -> None:
    artifact(path).unlink()
    artifact(path).mkdir()


@attack("missing-file")
def a_model_that_was_not_copied(path: Path) -> None:
    artifact(path).unlink()


@attack("missing-file")
def a_parity_that_was_not_copied(path: Path) -> None:
    next(path.glob("parity-*.npz")).unlink()


@attack("size")
def a_model_cut_short(path: Path) -> None:
    artifact(path).write_bytes(artifact(path).read_bytes()[:-3])


@attack("hash")
def one_bit_of_a_model(path: Path) -> None:
    content = bytearray(artifact(path).read_bytes())
    content[5] ^= 1
    artifact(path).write_bytes(content)


@attack("hash")
def a_profile_of_the_same_length(path: Path) -> None:
    profile = next(path.glob("profile-*.json"))
    profile.write_bytes(profile.read_bytes().replace(b"conv", b"norm"))


@attack("unlisted")
def weights_that_nobody_listed(path: Path) -> None:
    artifact(path).with_name("weights.bin").write_bytes(b"read by a model's external data")


@attack("unlisted")
def a_library_in_a_folder_below(path: Path) -> None:
    (artifact(path).parent / "lib").mkdir()
    (artifact(path).parent / "lib" / "libgomp.so.1").write_bytes(b"\x7fELF")
