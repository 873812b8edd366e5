"""The manifest of a bundle: its schema, its seal, and how nouns are written in it.  `docs/format.md` is the law.

`unseal` takes the bytes of a `manifest.json` from anyone and gives plain data of which every field has been
checked; the functions after it turn that data into the nouns, and back.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerando.errors import BundleError
from accelerando.goal import Bound, Check, Outcome, Verdict
from accelerando.interval import Interval
from accelerando.ladder import Rung
from accelerando.plugins import stored_recipe
from accelerando.recipe import Artifact, File, key_of
from accelerando.signature import Signature
from accelerando.strict_json import Each, Maybe, Number, Open, Text, canonical, check, parse
from accelerando.trial import Evidence

FORMAT = "accelerando-bundle"
SCHEMA = 1
MANIFEST_BYTES = 64 * 2**20
ARRAY_NUMBERS = 20_000_000  # in one array of evidence
RUNGS = 1000
FILES = 10_000  # of one rung
STUDENTS = 1000
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}

CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # no text may hold it, for it is printed to terminals
LINE = Text(10_000, CONTROL.replace("[", "[^") + "*", "text without control characters")
NAME = Text(200, r"[A-Za-z_][A-Za-z0-9_]*")
KEY = Text(12, "[0-9a-f]{12}")
HASH = Text(64, "[0-9a-f]{64}")
COUNT = Number()
NUMBER = (float, str)  # JSON has no infinity: it is the string "inf" or "-inf"
OUTCOME = Text(20, "|".join(o.value for o in Outcome))
FILE = {"path": LINE, "bytes": COUNT, "sha256": HASH}
INTERVAL = {"low": NUMBER, "mid": NUMBER, "high": NUMBER, "confidence": Number(0, 1, float)}
BOUND = {"quantity": NAME, "least": bool, "value": NUMBER, "relative": bool}
CHECK = {"bound": BOUND, "interval": INTERVAL, "outcome": OUTCOME, "shortfall": NUMBER, "note": LINE}
PORT = {
    "name": LINE,
    "dtype": Text(10, "bool|u?int(8|16|32|64)|float(16|32|64)"),
    "shape": [(int, str)],
}
PACKED = {"shape": [COUNT], "f4": Text(MANIFEST_BYTES, "[A-Za-z0-9+/]*={0,2}")}
PARTS = Open({"name": NAME})
EVIDENCE = {
    "split": LINE, "batch": Number(1), "rounds": PACKED, "stolen": PACKED, "seconds": PACKED,
    "original_seconds": PACKED, "scores": PACKED, "original_scores": PACKED, "metric": LINE,
    "higher_is_better": bool, "load_seconds": Number(0, 1e9, float), "peak_bytes": COUNT,
    "original_peak_bytes": COUNT, "disk_bytes": COUNT, "original_disk_bytes": COUNT, "machine": LINE,
}  # fmt: skip
RUNG = {
    "key": KEY, "recipe": {"steps": [PARTS], "backend": PARTS}, "text": [LINE], "certified": bool,
    "files": [FILE], "summary": Open({}), "evidence": EVIDENCE,
}  # fmt: skip
MACHINE = {
    "cpu": LINE, "cores": Number(1, 1e6), "isa": [LINE], "caches": Each(COUNT), "memory_bytes": COUNT,
    "accelerators": [LINE], "system": LINE, "python": LINE, "versions": Each(LINE),
}  # fmt: skip
WORKLOAD = {
    "form": LINE, "metric": LINE, "higher_is_better": bool, "digest": LINE, "select": COUNT, "certify": COUNT,
    "calibrate": COUNT, "notes": [LINE], "origin": Maybe(LINE),
}  # fmt: skip
RUN = {
    "started": LINE, "seconds": Number(0, 1e9, float), "budget_seconds": Maybe(Number(0, 1e9, float)),
    "trials": COUNT, "finished": bool, "accelerando": LINE, "command": Maybe(LINE),
}  # fmt: skip
SIGNATURE = {
    "inputs": [PORT], "outputs": [PORT], "parameters": [LINE], "positional": COUNT,
    "arguments": Each(Open({})), "result": Open({}),
}  # fmt: skip
MANIFEST = {
    "format": Text(30, FORMAT), "schema": Number(SCHEMA, SCHEMA), "accelerando": LINE, "created": LINE,
    "goal": {"text": LINE, "prefer": NAME},
    "verdict": {"outcome": OUTCOME, "checks": [CHECK]},
    "best": KEY, "signature": SIGNATURE, "machine": MACHINE, "workload": Open(WORKLOAD), "run": Open(RUN),
    "rungs": [RUNG], "parity": Maybe(FILE), "profile": Maybe(FILE), "students": [FILE], "seal": HASH,
}  # fmt: skip


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but the seal.  It detects damage, not forgery."""
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "seal"})).hexdigest()


def unseal(text: bytes) -> dict[str, Any]:
    """The checked fields of a `manifest.json`.

    Raises:
        BundleError: `not-json`, `not-a-bundle`, `schema`, `seal`, `field`, `rungs`, `recipe` or `path`.
    """
    data = parse(text, "manifest.json")
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError("not-a-bundle", f"manifest.json has no format field that says {FORMAT!r}")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise BundleError(
            "schema",
            f"the bundle is of schema {str(data.get('schema'))[:40]}, and this version reads schema {SCHEMA}; "
            "open it with the accelerando that wrote it, or a newer one",
        )
    if data.get("seal") != (actual := seal(data)):
        raise BundleError(
            "seal", f"manifest.json was changed or damaged: its content gives {actual[:12]}; copy the bundle again"
        )
    data = {"students": [], **data}  # bundles from before there were any do without
    check(data, MANIFEST, "manifest")
    _check_rungs(data)
    _check_students(data["students"])
    for name in ("parity", "profile"):
        if data[name] is not None and not is_extra(data[name]["path"]):
            raise BundleError("path", f"manifest.{name}.path must be {name}-<12 digits>.*, at the top of the bundle")
    return data


def _check_rungs(data: Mapping[str, Any]) -> None:
    """What no single field can tell of the rungs: keys, order, recipes, paths."""
    rungs, keys = data["rungs"], [r["key"] for r in data["rungs"]]
    if not 1 <= len(rungs) <= RUNGS:
        raise BundleError("rungs", f"a bundle must have 1 to {RUNGS} rungs, but this has {len(rungs)}")
    if len(set(keys)) < len(keys) or data["best"] not in keys:
        raise BundleError(
            "rungs", f"every rung must have a key of its own, and best be one of them, but: {data['best']}, {keys}"
        )
    for i, rung in enumerate(rungs):
        where, parts = f"manifest.rungs[{i}]", [*rung["recipe"]["steps"], rung["recipe"]["backend"]]
        for part in parts:
            check(part, Each(Maybe((bool, int, float, str))), f"{where}.recipe")
        if rung["key"] != key_of(rung["recipe"]) or len(rung["text"]) != len(parts):
            raise BundleError(
                "recipe", f"{where}.key is {rung['key']}, but its recipe gives {key_of(rung['recipe'])}"
                f" and {len(parts)} parts, of which {len(rung['text'])} have a text"
            )  # fmt: skip
        if not 1 <= len(rung["files"]) <= FILES:
            raise BundleError("rungs", f"{where} must have 1 to {FILES} files, but has {len(rung['files'])}")
        check_paths((f["path"] for f in rung["files"]), where)


def _check_students(files: list[dict[str, Any]]) -> None:
    if wrong := [f["path"] for f in files if not is_student(f["path"])]:
        raise BundleError(
            "path", f"manifest.students: {wrong[0][:80]!r} must be students/<12 digits>-<12 digits>.safetensors"
        )
    if len(files) > STUDENTS or len({student_key(File(**f)) for f in files}) < len(files):
        raise BundleError(
            "students", f"there must be at most {STUDENTS} students, each of other steps, but there are {len(files)}"
        )


def check_paths(paths: Iterable[str], where: str) -> None:
    """Refuse what could leave the folder, or would mean another file on another system.

    Raises:
        BundleError: `path`.
    """
    seen: set[str] = set()
    for path in paths:
        parts = path.split("/")
        wrong = (
            "be relative, with / between its parts and no special characters"
            if path.startswith("/") or re.search(r'[\\:*?"<>|\n\t]', path)
            else "have no empty, . or .. part" if any(p in ("", ".", "..") for p in parts)
            else "have no part that ends in a dot or a space" if any(p[-1] in ". " for p in parts)
            else "hold no name that a system reserves" if any(p.split(".")[0].lower() in RESERVED for p in parts)
            else "have at most 200 characters" if len(path) > 200
            else "be there once" if path.casefold() in seen
            else ""
        )  # fmt: skip
        if wrong:
            raise BundleError("path", f"{where}: the path {path[:80]!r} must {wrong}")
        seen.add(path.casefold())


# --- the nouns as plain data, and back --------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """The value with every infinity or NaN as a string, for JSON has none."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def printable(value: Any) -> Any:
    """The value with no control characters in its strings, and those cut to a length.

    A library's own words may hold anything, and are printed to terminals.
    """
    if isinstance(value, Mapping):
        return {str(k): printable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable(v) for v in value]
    return re.sub(CONTROL, "\ufffd", value)[: LINE.most] if isinstance(value, str) else finite(value)


def file_from_json(data: Mapping[str, Any] | None) -> File | None:
    return None if data is None else File(**data)


def rung_to_json(rung: Rung) -> dict[str, Any]:
    recipe = rung.recipe
    return {
        "key": recipe.key,
        "recipe": recipe.to_json(),
        "text": [str(part) for part in (*recipe.steps, recipe.backend)],
        "certified": rung.certified,
        "files": rung.artifact.to_json(),
        "summary": finite(rung.evidence.summary()),
        "evidence": rung.evidence.to_json(),
    }


def rung_from_json(data: Mapping[str, Any]) -> Rung:
    """Raises BundleError `evidence` where the arrays do not hold what they say."""
    recipe = stored_recipe(data["recipe"], data["text"])
    return Rung(recipe, Artifact.from_json(data["files"]), evidence_from_json(data["evidence"]), data["certified"])


def evidence_from_json(data: dict[str, Any]) -> Evidence:
    """The evidence of checked fields.

    Raises:
        BundleError: `evidence`: an array is too large, does not unpack, or does not fit the others.
    """
    for name, array in data.items():
        if isinstance(array, dict) and math.prod(array["shape"]) > ARRAY_NUMBERS:
            raise BundleError("evidence", f"{name} is said to be {array['shape']}, more than {ARRAY_NUMBERS} numbers")
    try:
        evidence = Evidence.from_json(data)
        rounds, scores = evidence.rounds, evidence.scores
        wrong = (
            "rounds must be (r, 2)" if rounds.ndim != 2 or rounds.shape[1] != 2 or not len(rounds)
            else "stolen must be (r,)" if evidence.stolen.shape != rounds.shape[:1]
            else "seconds must be (s,)" if {evidence.seconds.ndim, evidence.original_seconds.ndim} != {1}
            else "seconds must not be empty" if not evidence.seconds.size or not evidence.original_seconds.size
            else "scores must be (n, k), the original's too" if scores.ndim != 2 or not scores.size
            or evidence.original_scores.shape != scores.shape
            else ""
        )  # fmt: skip
    except (ValueError, zlib.error) as error:
        raise BundleError("evidence", f"an array does not unpack: {error}") from error
    times = (rounds, evidence.seconds, evidence.original_seconds)
    if not wrong and not all(((t > 0) & (t < math.inf)).all() for t in times):
        wrong = "seconds must be above 0 and finite"
    if wrong:
        raise BundleError("evidence", f"{wrong}, but they are not; measure again with `accelerando bench`")
    return evidence


def verdict_to_json(verdict: Verdict) -> dict[str, Any]:
    checks = [
        {
            "bound": finite({f: getattr(c.bound, f) for f in BOUND}),
            "interval": finite(c.interval.to_json()),
            "outcome": c.outcome.value,
            "shortfall": finite(c.shortfall),
            "note": c.note,
        }
        for c in verdict.checks
    ]
    return {"outcome": verdict.outcome.value, "checks": checks}


def verdict_from_json(data: Mapping[str, Any]) -> Verdict:
    """Raises BundleError `field` where an interval is not in order."""
    try:
        checks = tuple(
            Check(
                Bound(**{**c["bound"], "value": float(c["bound"]["value"])}),
                Interval.from_json({k: float(v) for k, v in c["interval"].items()}),
                Outcome(c["outcome"]),
                float(c["shortfall"]),
                c["note"],
            )
            for c in data["checks"]
        )
    except ValueError as error:
        raise BundleError("field", f"manifest.verdict.checks: {error}") from error
    return Verdict(Outcome(data["outcome"]), checks)


def signature_from_json(data: dict[str, Any]) -> Signature:
    """Raises BundleError `signature` where a tree does not fit the ports."""
    for name, trees, ports in (
        ("arguments", data["arguments"].values(), data["inputs"]),
        ("result", [data["result"]], data["outputs"]),
    ):
        leaves = sorted(leaf for tree in trees for leaf in _leaves(tree))
        if leaves != list(range(len(ports))) or not ports:
            raise BundleError("signature", f"{name} must hold each of {len(ports)} ports once, but holds {leaves[:20]}")
    if data["positional"] > len(data["arguments"]):
        raise BundleError("signature", f"{data['positional']} arguments are positional of {len(data['arguments'])}")
    if any(isinstance(axis, int) and axis < 0 for p in (*data["inputs"], *data["outputs"]) for axis in p["shape"]):
        raise BundleError("signature", "an axis has a negative length")
    return Signature.from_json(data)


def _leaves(node: Any) -> Iterator[int]:
    match node:
        case {"leaf": int(index), **rest} if not rest and not isinstance(index, bool):
            yield index
        case {"const": None | bool() | int() | float() | str(), **rest} if not rest:
            return
        case {"tuple": list(items), **rest} | {"list": list(items), **rest} if not rest:
            for item in items:
                yield from _leaves(item)
        case {"dict": dict(items), **rest} if not rest:
            for item in items.values():
                yield from _leaves(item)
        case {"object": str(), "fields": dict(items), **rest} if not rest:
            for item in items.values():
                yield from _leaves(item)
        case _:
            raise BundleError("signature", f"{str(node)[:80]} is not a node of a call or an answer")


def described(name: str, kind: str, content: bytes) -> dict[str, Any]:
    """A file at the top of the bundle, as the manifest names it: after its content, `parity-<12 digits>.npz`."""
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.asdict(File(f"{name}-{digest[:12]}.{kind}", len(content), digest))


def is_extra(name: str) -> bool:
    """Whether a file's name is one that `described` gives."""
    return re.fullmatch(r"(parity-[0-9a-f]{12}\.npz|profile-[0-9a-f]{12}\.json)", name) is not None


def student(key: str, path: Path) -> File:
    """The weights of a student, as the manifest names them: after the key of its steps, and their content."""
    file = File.of(path, path.parent)
    return dataclasses.replace(file, path=f"students/{key}-{file.sha256[:12]}.safetensors")


def student_key(file: File) -> str:
    """The key of the steps that a student has been through."""
    return file.path.removeprefix("students/")[:12]


def is_student(name: str) -> bool:
    """Whether a path is one that `student` gives."""
    return re.fullmatch(r"students/[0-9a-f]{12}-[0-9a-f]{12}\.safetensors", name) is not None


def is_key(name: str) -> bool:
    """Whether a name is a recipe's key."""
    return re.fullmatch(KEY.pattern, name) is not None
