"""A cascade: a fast recipe answers where it is sure, and a better one answers the rest."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from accelerando.disk import read_file
from accelerando.errors import BundleError, Reason, RefusalError
from accelerando.interval import Floats
from accelerando.machine import Machine
from accelerando.metric import primary
from accelerando.plugins import StoredBackend, recipe_from_json, stored_recipe
from accelerando.recipe import Artifact, Backend, Recipe, Runner
from accelerando.signature import Array, Port, Signature
from accelerando.strict_json import Each, Maybe, Text, canonical, check, parse
from accelerando.workload import Form, Model, filled

FORMAT = 1
EXIT = "early_exit"  # the technique whose front and rest go together, and the port between them
RECORD = "cascade.json"
MOST_TEXT = 20_000  # characters of a member's recipe
KNOBS = Each(Maybe((bool, int, float, str)))
NAMED = Text(200, r"[A-Za-z_][A-Za-z0-9_]*")


def margin(logits: Array) -> Floats:
    """How far the likeliest class is ahead of the second, (n,) in [0, 1]; `logits` (n, classes)."""
    z = np.asarray(logits, dtype=np.float64)
    second, first = np.partition(z, -2, axis=1)[:, -2:].T
    ahead: Floats = (1 - np.exp(second - first)) / np.exp(z - first[:, None]).sum(axis=1)
    return ahead


def certainty(logits: Array) -> Floats:
    """1 - the entropy over its largest, (n,) in [0, 1]; `logits` (n, classes)."""
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    power = np.exp(z)
    total = power.sum(axis=1)
    entropy = np.log(total) - (power * z).sum(axis=1) / total
    sure: Floats = np.clip(1 - entropy / math.log(z.shape[1]), 0.0, 1.0)
    return sure


CONFIDENCES: Mapping[str, Callable[[Array], Floats]] = MappingProxyType({"margin": margin, "entropy": certainty})


@dataclass(frozen=True)
class Cascade(Backend):
    """Ask the fast recipe; the rows of which it is not sure leave the batch, and the better one answers those.

    It takes no model itself: each of its recipes does, from the original on.  The two are answered by row, so every
    output's axis 0 must be the batch, as it is in every signature.  As thread-safe as the two are.

    Where the recipes are the two parts of one early exit, the fast one hands its state over, and the better one goes
    on from there instead of beginning anew.

    (Viola & Jones, *Rapid Object Detection using a Boosted Cascade*, 2001; Bolukbasi et al., *Adaptive Neural
    Networks for Efficient Inference*, 2017.)

    Args:
        fast, better: the canonical JSON of a recipe each, or both empty, which is no cascade; `of` writes them.
        confidence: of the softmax over the judged output's classes: `margin`, the distance of the first two; or
            `entropy`, 1 - the entropy over the most it can be.
        threshold: a row whose confidence is below it is asked again: 0 asks none, above 1 all.
    """

    fast: str = ""
    better: str = ""
    confidence: str = "margin"
    threshold: float = 0.5

    takes: ClassVar[frozenset[Form]] = frozenset()
    offers: ClassVar[frozenset[str]] = frozenset({"early exits"})
    steady: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.confidence not in CONFIDENCES:
            raise ValueError(f"confidence must be one of {', '.join(CONFIDENCES)}, but is {self.confidence!r}")
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold <= 2:
            raise ValueError(f"threshold must be a number from 0 to 2, but is {self.threshold!r}")
        if bool(self.fast) != bool(self.better):
            raise ValueError("a cascade needs two recipes, but one is empty")
        if self.fast:
            _check_recipe("fast", self.fast)
            _check_recipe("better", self.better)
            _check_parts(*self._plain)

    @classmethod
    def of(cls, fast: Recipe, better: Recipe, confidence: str, threshold: float) -> Cascade:
        """The cascade of two recipes."""
        first, second = (canonical(recipe.to_json()).decode() for recipe in (fast, better))
        return cls(first, second, confidence, float(threshold))

    def with_members(self, members: Sequence[Recipe]) -> Cascade:
        fast, better = members
        return self.of(fast, better, self.confidence, self.threshold)

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Cascade]:
        return ()  # it is made of recipes that were measured, by `search/cascades.py`

    @property
    def members(self) -> tuple[Recipe, ...]:
        return tuple(recipe_from_json(data) for data in self._plain)

    @property
    def stored_members(self) -> tuple[Recipe, ...]:
        """The two recipes without the code of any technique: all that is needed to load and to print."""
        return tuple(map(stored_recipe, self._plain))

    @property
    def hands_over(self) -> bool:
        """Whether the better recipe goes on where the fast one stopped."""
        return bool(self.fast) and _part(self._plain[0]) == "front"

    @property
    def _plain(self) -> list[dict[str, Any]]:
        return [parse(text.encode(), "a member") for text in (self.fast, self.better) if text]

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if not self.fast:
            return RefusalError(Reason.NOTHING_TO_DO, "a cascade is made of two recipes, but none were given")
        refusals = [_why_not(member.backend) for member in self.stored_members]
        return next(filter(None, refusals), None) or why_no_classes(model.signature)

    def compile(self, model: Model, folder: Path) -> Artifact:
        """Write `cascade.json` beside the members, which lie in `0/` and `1/`."""
        if refusal := why_no_classes(model.signature):
            raise refusal
        (folder / RECORD).write_bytes(self._record(model.signature))
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        """Both members in this process, with its settings.

        Raises:
            BundleError: `cascade.json` does not say what the recipe and the signature say.
            RefusalError: a member can't run here.
        """
        if refusal := why_no_classes(signature):
            raise refusal
        expected = self._record(signature)
        if read_file(folder, RECORD, len(expected) + 1, "missing-file") != expected:
            raise BundleError("field", f"{RECORD} says otherwise than the recipe {self}; copy the bundle again")
        with contextlib.ExitStack() as loaded:
            runners = []
            for i, (member, ports) in enumerate(zip(self.stored_members, self._signatures(signature), strict=True)):
                if refusal := _why_not(member.backend):
                    raise refusal
                own = (f for f in artifact.files if f.path.startswith(f"{i}/"))
                part = Artifact(tuple(replace(f, path=f.path.partition("/")[2]) for f in own))
                backend = member.backend.here(**self.settings)
                runners.append(backend.load(part, folder / str(i), ports))
                loaded.callback(runners[-1].close)
            loaded.pop_all()
        return _Cascade(self, runners[0], runners[1], signature)

    def _signatures(self, signature: Signature) -> tuple[Signature, Signature]:
        """How the members are called.  The state between them has further axes, which are their own affair."""
        if not self.hands_over:
            return signature, signature
        state = Port(EXIT, "float32", signature.inputs[0].shape[:1])
        front = replace(signature, outputs=(*signature.outputs, state))
        return front, replace(signature, inputs=(*signature.inputs, state))

    def _record(self, signature: Signature) -> bytes:
        backends = [member["backend"] for member in self._plain]
        said = {"confidence": self.confidence, "threshold": self.threshold, "members": backends}
        return canonical({"format": FORMAT, "output": judged_output(signature), **said})

    def __str__(self) -> str:
        if not self.fast:
            return self.name
        fast, better = (" > ".join(p.name for p in (*m.steps, m.backend)) for m in self.stored_members)
        return f"{self.name}({self.confidence} >= {self.threshold:.4g}: {fast}, else {better})"


def judged_output(signature: Signature) -> int:
    """The number of the output that a metric looks at."""
    numbers = [np.asarray(i) for i in range(len(signature.outputs))]
    return int(primary(signature.answer(numbers)))


class _Cascade(Runner):
    """Two runners, and the rule by which the second is asked."""

    def __init__(self, cascade: Cascade, fast: Runner, better: Runner, signature: Signature) -> None:
        self._fast, self._better = fast, better
        self._confidence, self._threshold = CONFIDENCES[cascade.confidence], cascade.threshold
        self._output, self._fixed = judged_output(signature), signature.fixed_batch
        self._count = len(signature.outputs)  # what the fast one gives besides is its state

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        given = self._fast(leaves)
        answers, state = given[: self._count], given[self._count :]
        sure = self._confidence(answers[self._output]) >= self._threshold  # a confidence of NaN is below any
        if sure.all():
            return answers
        if not sure.any():
            return self._better([*leaves, *state])
        unsure = np.flatnonzero(~sure)
        better = self._better(filled([x[unsure] for x in (*leaves, *state)], self._fixed))
        merged = [np.array(answer) for answer in answers]
        for whole, rows in zip(merged, better, strict=True):
            whole[unsure] = rows[: len(unsure)]
        return merged

    def close(self) -> None:
        self._fast.close()
        self._better.close()


def _check_recipe(name: str, text: object) -> None:
    """Raises ValueError where a knob is not the canonical JSON of a recipe that is no cascade itself."""
    if not isinstance(text, str) or len(text) > MOST_TEXT:
        raise ValueError(f"{name} must be a recipe's JSON of at most {MOST_TEXT} characters")
    try:
        data = parse(text.encode(), name)
        check(data, {"steps": [KNOBS], "backend": KNOBS}, name)
        for part in (*data["steps"], data["backend"]):
            check(part.get("name"), NAMED, f"{name}.name")
    except BundleError as error:
        raise ValueError(error.message) from error
    if canonical(data).decode() != text:
        raise ValueError(f"{name} must be the canonical text of a recipe's JSON: sorted keys, no spaces")
    if data["backend"]["name"] == "cascade":
        raise ValueError(f"{name} is a cascade itself, but must be a plain recipe")


def _part(recipe: Mapping[str, Any]) -> str | None:
    """Which part of an early exit a recipe's JSON ends with, if it is one that can't stand alone."""
    last = recipe["steps"][-1] if recipe["steps"] else {}
    return last["part"] if last.get("name") == EXIT and last.get("part") in ("front", "rest") else None


def _check_parts(fast: Mapping[str, Any], better: Mapping[str, Any]) -> None:
    """Raises ValueError where a member is a part of an early exit without the other part of the same."""
    if (parts := (_part(fast), _part(better))) == (None, None):
        return
    before, last = fast["steps"][:-1], fast["steps"][-1:]
    if parts != ("front", "rest") or better["steps"] != [*before, *({**step, "part": "rest"} for step in last)]:
        raise ValueError(
            "fast and better must be the front and the rest of one early exit, after the same steps, "
            f"where one of them is a part of one; but they are {parts[0]} and {parts[1]}"
        )


def _why_not(backend: Backend) -> RefusalError | None:
    if isinstance(backend, StoredBackend):
        return RefusalError(Reason.MISSING_PACKAGE, backend.why)
    if missing := backend.missing():
        return RefusalError(Reason.MISSING_PACKAGE, f"{backend.name} needs: pip install {' '.join(missing)}")
    if not backend.portable:
        return RefusalError(Reason.UNSUPPORTED, f"{backend.name} runs the user's own code, and a cascade does not")
    return None


def why_no_classes(signature: Signature) -> RefusalError | None:
    port = signature.outputs[judged_output(signature)]
    classes = port.shape[1] if len(port.shape) == 2 else 0
    if port.dtype.startswith("float") and isinstance(classes, int) and classes >= 2:
        return None
    return RefusalError(
        Reason.UNSUPPORTED, f"confidence is read off classes, a float output (batch, 2 or more), but there is {port}"
    )
