"""Attacks on the manifest as a text: not a bundle, not JSON, another schema, a broken seal, wrong fields."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerando import manifest

from .making import (
    attack,
    edit,
    edit_file,
    edit_rung,
)


@attack("not-a-bundle")
def an_empty_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@attack("not-a-bundle")
def a_file_in_place_of_the_folder(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a bundle, honestly")


@attack("not-a-bundle")
def another_tools_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"name": "a web app", "icons": []}')


@attack("too-big")
def a_manifest_that_fills_the_memory(path: Path) -> None:
    with (path / "manifest.json").open("r+b") as stream:
        stream.truncate(manifest.MANIFEST_BYTES + 1)  # a hole: it takes no room on the disk


@attack("not-json")
def a_torn_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(text[: len(text) // 2])


@attack("not-json")
def not_a_number(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"value": 2.0', '"value": NaN'))


@attack("not-json")
def a_number_beyond_floats(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"value": 2.0', '"value": 1e999'))


@attack("not-json")
def a_key_that_is_there_twice(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"best":', '"best": "000000000000", "best":'))


@attack("not-json")
def brackets_that_exhaust_the_stack(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": ' + "[" * 200_000)


@attack("not-json")
def a_tree_too_deep_to_walk(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": ' + "[" * 100 + "]" * 100 + "}")


@attack("not-json")
def bytes_that_are_not_utf8(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes().replace(b"fake", b"f\xe4ke"))


@attack("schema")
def a_schema_of_the_future(path: Path) -> None:
    edit(path, lambda data: data.update(schema=2))


@attack("schema")
def a_schema_that_is_true(path: Path) -> None:
    edit(path, lambda data: data.update(schema=True))


@attack("seal")
def a_figure_that_was_polished(path: Path) -> None:
    edit(path, lambda data: data["rungs"][1]["summary"].update(peak_bytes=1), seal=False)


@attack("field")
def a_field_that_is_missing(path: Path) -> None:
    edit(path, lambda data: data["machine"].pop("cores"))


@attack("field")
def a_field_that_nobody_knows(path: Path) -> None:
    edit(path, lambda data: data.update(hook="import os"))


@attack("field")
def a_string_where_a_number_must_be(path: Path) -> None:
    edit_file(path, bytes="12")


@attack("field")
def a_negative_size(path: Path) -> None:
    edit_file(path, bytes=-1)


@attack("field")
def an_escape_sequence_for_the_terminal(path: Path) -> None:
    edit(path, lambda data: data["machine"].update(cpu="\x1b]0;pwned\x07\x1b[2J"))


@attack("field")
def an_interval_out_of_order(path: Path) -> None:
    edit(path, lambda data: data["verdict"]["checks"][0]["interval"].update(low=9.0, high=1.0))


@attack("field")
def a_knob_that_is_a_tree(path: Path) -> None:
    edit(path, lambda data: data["rungs"][1]["recipe"]["backend"].update(level={"a": 1}))


@attack("goal")
def a_goal_that_does_not_parse(path: Path) -> None:
    edit(path, lambda data: data["goal"].update(text="as fast as you can"))


@attack("rungs")
def a_ladder_without_rungs(path: Path) -> None:
    edit(path, lambda data: data.update(rungs=[]))


@attack("rungs")
def more_rungs_than_anyone_needs(path: Path) -> None:
    edit(path, lambda data: data.update(rungs=data["rungs"] * 400))


@attack("rungs")
def the_same_rung_twice(path: Path) -> None:
    edit(path, lambda data: data["rungs"].append(data["rungs"][0]))


@attack("rungs")
def a_best_rung_that_is_not_there(path: Path) -> None:
    edit(path, lambda data: data.update(best="0" * 12))


@attack("rungs")
def a_rung_without_files(path: Path) -> None:
    edit_rung(path, files=[])


@attack("recipe")
def a_knob_turned_behind_the_keys_back(path: Path) -> None:
    edit(path, lambda data: data["rungs"][1]["recipe"]["backend"].update(level=7))


@attack("recipe")
def a_recipe_in_the_place_of_another(path: Path) -> None:
    edit(path, lambda data: data["rungs"][1].update(recipe=data["rungs"][0]["recipe"]))
