"""The bundle: the folder that leaves the search and enters the runtime.  JSON and hashed files, never a pickle.

`docs/format.md` is the law of it: what must hold, and the code of every error.  `manifest.py` knows the manifest,
`parity.py` the stored rows; here is the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerando import manifest as law
from accelerando.disk import check_file, check_files, copy_file, join, read_file, write_file
from accelerando.errors import (
    BrokenPluginError,
    BundleError,
    MissingExtraError,
    ModelError,
    RefusalError,
    UsageError,
)
from accelerando.goal import Goal, Verdict
from accelerando.ladder import Ladder, Rung
from accelerando.machine import Machine, installed_version
from accelerando.parity import PARITY_BYTES, Parity
from accelerando.plugins import StoredBackend, stored_recipe
from accelerando.proof import Finding, findings
from accelerando.recipe import File, Knob, Runner
from accelerando.signature import Signature
from accelerando.strict_json import Each, Maybe, Number, Open, canonical, check, parse
from accelerando.trial import Trial

SCHEMA = law.SCHEMA
PROFILE_BYTES = 64 * 2**20
JOURNAL_BYTES = 2**30
STUDENT_BYTES = 2**32
TRIAL = Open({"recipe": {"steps": [law.PARTS], "backend": law.PARTS}, "seconds": Number(0, 1e9, float), "log": [str]})
OUTCOMES = {
    "verified": {"artifact": [law.FILE], "evidence": law.EVIDENCE},
    "refused": {
        "reason": str,
        "detail": str,
        "step": Maybe(Number(0, 1000, int)),
        "evidence": Maybe(law.EVIDENCE),
        "speedup": Maybe(law.INTERVAL),
    },
}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Args:
        path: the folder.
        goal: what was asked for.
        verdict: what the best rung's evidence says of the goal.
        best: number of the best rung of the ladder.
        ladder: rungs from the original to the fastest; rung i's files lie in `rungs/<recipe key>/`.
        signature: how the model is called.
        machine: where the evidence was gathered.
        workload: plain data about the workload: form, metric, higher_is_better, digest, select (count), certify
            (count), calibrate (count), notes (list), origin (how to get the original again, or null).
        run: plain data about the run: started (ISO time), seconds, budget_seconds, trials (count), finished (bool),
            accelerando (version), command (how to reproduce it).
        created: ISO time at which the manifest was written.
        summaries: what the manifest says of each rung in plain figures; the evidence is what counts.
        parity_file, profile_file, student_files: as the manifest describes them.
    """

    path: Path
    goal: Goal
    verdict: Verdict
    best: int
    ladder: Ladder
    signature: Signature
    machine: Machine
    workload: Mapping[str, Any]
    run: Mapping[str, Any]
    created: str = ""
    summaries: tuple[Mapping[str, Any], ...] = ()
    parity_file: File | None = None
    profile_file: File | None = None
    student_files: tuple[File, ...] = ()

    @classmethod
    def open(cls, path: str | Path, *, hashes: bool = True) -> Bundle:
        """Open a folder, believing nothing of it.

        Args:
            hashes: read every byte of every artifact; without it their presence and sizes only.

        Raises:
            BundleError: it is not a bundle, is damaged, or is of a schema that this version does not read; `code`
                says which of the ways in `docs/format.md`.
            UsageError: it is no path.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(f"a bundle is opened by the path of its folder, a text or a Path, but {path!r} was given")
        path = Path(path)
        bundle = cls._of(path, law.unseal(read_file(path, "manifest.json", law.MANIFEST_BYTES, "not-a-bundle")))
        for rung in bundle.ladder.rungs:
            bundle.check_rung(rung, hashes=hashes)
        for file, most in ((bundle.parity_file, PARITY_BYTES), (bundle.profile_file, PROFILE_BYTES)):
            if file:
                read_file(path, file.path, most, "missing-file", file if hashes else None)
        bundle._check_students(hashes=hashes)
        return bundle

    @classmethod
    def write(
        cls,
        path: str | Path,
        *,
        goal: Goal,
        verdict: Verdict,
        best: int,
        ladder: Ladder,
        signature: Signature,
        machine: Machine,
        workload: Mapping[str, Any],
        run: Mapping[str, Any],
        profile: Mapping[str, Any] | None = None,
        parity: Parity | None = None,
        students: Mapping[str, Path] = MappingProxyType({}),
    ) -> Bundle:
        """Write the manifest over artifacts that lie in `rungs/<recipe key>/` already, all or nothing.

        The former manifest stays whole and true until the new one takes its place; what only the former needed is
        removed after that.

        Args:
            students: files of weights, by the key of the steps that they were taught in; those that are larger than
                a reader takes are left out.

        Raises:
            BundleError: `no-room`: the disk is full; `missing-file` or `size`: an artifact is not in its place;
                `field` and others: a reader would refuse what was given.
        """
        path = Path(path)
        extras: dict[str, bytes] = {}
        data: dict[str, Any] = {
            "format": law.FORMAT,
            "schema": SCHEMA,
            "accelerando": installed_version("accelerando") or "unknown",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "goal": {"text": goal.text, "prefer": goal.prefer},
            "verdict": law.verdict_to_json(verdict),
            "best": ladder.rungs[best].recipe.key,
            "signature": signature.to_json(),
            "machine": law.printable(machine.to_json()),
            "workload": law.printable(workload),
            "run": law.printable(run),
            "rungs": [law.rung_to_json(rung) for rung in ladder.rungs],
            "parity": None,
            "profile": None,
            "students": [dataclasses.asdict(file) for file in _kept(path, students)],
        }
        for name, kind, content in (
            ("parity", "npz", None if parity is None else parity.to_bytes()),
            ("profile", "json", None if profile is None else canonical(law.finite(profile))),
        ):
            if content is not None:  # named after its content: the former manifest's stays in its place
                file = law.described(name, kind, content)
                data[name], extras[file["path"]] = file, content
        try:
            text = json.dumps({**data, "seal": law.seal(data)}, indent=1, allow_nan=False).encode()
        except (ValueError, TypeError) as error:
            raise BundleError("field", f"the manifest must be plain, finite JSON, but: {error}") from error
        bundle = cls._of(path, law.unseal(text))
        for rung in bundle.ladder.rungs:
            bundle.check_rung(rung, hashes=False, sync=True)
        bundle._check_students(hashes=False, sync=True)
        for name, content in extras.items():
            write_file(path / name, content)
        write_file(path / "manifest.json", text)
        bundle._sweep()
        return bundle

    @classmethod
    def _of(cls, path: Path, data: dict[str, Any]) -> Bundle:
        """The bundle of a manifest's checked fields."""
        try:
            goal = Goal.parse(data["goal"]["text"], data["goal"]["prefer"])
        except Exception as error:
            raise BundleError("goal", f"the goal {data['goal']} can't be read: {error}") from error
        return cls(
            path=path,
            goal=goal,
            verdict=law.verdict_from_json(data["verdict"]),
            best=[r["key"] for r in data["rungs"]].index(data["best"]),
            ladder=Ladder(tuple(map(law.rung_from_json, data["rungs"]))),
            signature=law.signature_from_json(data["signature"]),
            machine=Machine.from_json(data["machine"]),
            workload=data["workload"],
            run=data["run"],
            created=data["created"],
            summaries=tuple(r["summary"] for r in data["rungs"]),
            parity_file=law.file_from_json(data["parity"]),
            profile_file=law.file_from_json(data["profile"]),
            student_files=tuple(File(**f) for f in data["students"]),
        )

    def folder(self, rung: Rung) -> Path:
        """Where the files of a rung lie."""
        return self.path / "rungs" / rung.recipe.key

    def check_rung(self, rung: Rung, *, hashes: bool = True, sync: bool = False) -> None:
        """Raises BundleError where the files of a rung are not those that the manifest describes."""
        check_files(self.path, f"rungs/{rung.recipe.key}", rung.artifact.files, hashes=hashes, sync=sync)

    def _check_students(self, *, hashes: bool, sync: bool = False) -> None:
        for file in self.student_files:
            check_file(self.path, file.path, file, hashes=hashes, sync=sync, most=STUDENT_BYTES)

    @property
    def students(self) -> dict[str, Path]:
        """Where the weights lie that lessons ended with, as safetensors, by the key of all steps up to the lesson."""
        return {law.student_key(file): self.path / file.path for file in self.student_files}

    def check_workload(self, digest: str) -> None:
        """Raises BundleError `other-model` where the evidence here is about another model or other data."""
        if self.workload["digest"] != digest:
            raise BundleError(
                "other-model",
                f"{self.path} holds a bundle of another model, or of other data: its digest is "
                f"{self.workload['digest'][:16]}, not {digest[:16]}; give another folder",
            )

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial of the search, from `trials.jsonl`; its last line may be torn.

        Raises:
            BundleError: `journal`: another line is not a trial.
        """
        return tuple(self._journal())

    def _journal(self) -> Iterator[Trial]:
        if not join(self.path, "trials.jsonl").exists():
            return
        lines = read_file(self.path, "trials.jsonl", JOURNAL_BYTES, "journal").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # torn: its writer died; the search tries it again
            try:
                yield _trial(parse(line, "trials.jsonl"))
            except (BundleError, KeyError, ValueError, AttributeError) as error:
                raise BundleError(
                    "journal", f"line {number} of trials.jsonl is not a trial: {error}; remove it"
                ) from error

    @property
    def profile(self) -> Mapping[str, Any] | None:
        """The profile of the original, where one was made."""
        if self.profile_file is None:
            return None
        content = read_file(self.path, self.profile_file.path, PROFILE_BYTES, "missing-file", self.profile_file)
        profile = parse(content, self.profile_file.path)
        check(profile, Open({}), "profile")
        return dict(profile)

    @property
    def parity(self) -> Parity | None:
        """Rows with the answers of the original and of every rung, where they were stored."""
        if self.parity_file is None:
            return None
        return Parity.from_bytes(
            read_file(self.path, self.parity_file.path, PARITY_BYTES, "missing-file", self.parity_file)
        )

    def differences(self) -> tuple[str, ...]:
        """How this machine differs from the one where the evidence was gathered; empty where it carries over."""
        return Machine.look().differences(self.machine)

    def start(self, rung: Rung, model: Any = None, **settings: Knob) -> Runner:
        """Load a rung in this process, after its files were checked byte by byte.

        Args:
            model: the original module, which rungs that are not portable need.
            settings: of the backend for this process: its knobs, such as `spinning=False`; and `shared=True`, where
                rungs of this process are to share what they can of memory, which ONNX Runtime's do.  One that the
                backend does not know is left.

        Raises:
            MissingExtraError: its backend, or a package that the backend needs, is not installed.
            ModelError: it needs the original module, and none was given.
            RefusalError: the backend can't run it on this machine.
            BundleError: its files are damaged, or (`load`) the backend fails on them.
        """
        backend = rung.recipe.backend
        if isinstance(backend, StoredBackend):
            raise MissingExtraError(f"the rung {rung.recipe} can't be loaded here: {backend.why}")
        if missing := backend.missing():
            raise MissingExtraError(
                f"the rung {rung.recipe} needs {', '.join(missing)}: pip install {' '.join(missing)}"
            )
        if not backend.portable and model is None:
            raise ModelError(
                f"the rung {rung.recipe} runs the original's own code; give the module: load(..., model=model)"
            )
        self.check_rung(rung)
        try:
            return backend.here(**settings).load(rung.artifact, self.folder(rung), self.signature, model)
        except RefusalError:
            raise
        except Exception as error:
            raise BundleError(
                "load", f"{backend.name} can't load the rung {rung.recipe}: {type(error).__name__}: {error}"
            ) from error

    def verify(self, model: Any = None) -> list[Finding]:
        """Look at everything: hashes, summaries and verdict against the evidence, then each rung's stored answers.

        Loads every rung in this process: call it in a child where that must not be.

        Args:
            model: the original module, for rungs that are not portable.
        """
        return list(findings(self, model))

    def _sweep(self) -> None:
        """Remove what only a former manifest needed."""
        keys = {rung.recipe.key for rung in self.ladder.rungs}
        for folder in (self.path / "rungs").iterdir():
            if law.is_key(folder.name) and folder.name not in keys and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
        named = {f.path for f in (self.parity_file, self.profile_file) if f}
        for file in self.path.iterdir():
            if law.is_extra(file.name) and file.name not in named:
                file.unlink(missing_ok=True)
        taught = {f.path for f in self.student_files}
        for file in (self.path / "students").glob("*"):
            if law.is_student(f"students/{file.name}") and f"students/{file.name}" not in taught:
                file.unlink(missing_ok=True)


def _kept(path: Path, students: Mapping[str, Path]) -> Iterator[File]:
    """The files of students, each put into its place; without those that are larger than a reader takes."""
    for key, source in sorted(students.items()):
        if source.stat().st_size > STUDENT_BYTES:
            continue
        file = law.student(key, source)
        target = path / file.path
        if not target.exists() or File.of(target, path) != file:
            copy_file(source, target)
        yield file


def _trial(data: Any) -> Trial:
    """One line of the journal; a recipe whose plugin is not installed is kept by name and knobs."""
    check(data, TRIAL, "trial")
    kinds = [kind for kind in OUTCOMES if kind in data]
    if len(kinds) != 1:
        raise ValueError("it must be verified or refused")
    check(data[kinds[0]], OUTCOMES[kinds[0]], kinds[0])
    for part in (*data["recipe"]["steps"], data["recipe"]["backend"]):
        check(part, Each(Maybe((bool, int, float, str))), "recipe")
    if data[kinds[0]]["evidence"] is not None:
        law.evidence_from_json(data[kinds[0]]["evidence"])
    try:
        return Trial.from_json(data)
    except BrokenPluginError:
        return Trial.from_json(data, stored_recipe(data["recipe"]))
