"""What happened to a recipe.

`Evidence` keeps raw numbers (seconds of every call, scores of every sample) and derives every statistic from
them; `Verified` and `Refused` are the two outcomes; a `Trial` is one line of the journal.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from accelerando.errors import Reason
from accelerando.interval import Floats, Interval, median_interval, paired_bootstrap, quantile_interval
from accelerando.metric import METRICS, Metric
from accelerando.plugins import recipe_from_json
from accelerando.recipe import Artifact, Recipe

FEW_ROUNDS = 6  # fewer can't give a 95 % interval of the median
STOLEN_SHARE = 0.02  # of the processor's time, taken by others while a round ran
# Two processes of the same files differ in speed by a percent or so, for memory falls otherwise in each: one in twenty
# pairs by more than this.  No number of rounds between the same two shows it.
LUCK = 0.012
DRIFT = 0.1  # how far the original's second half may differ from its first


@dataclass(frozen=True, eq=False)  # arrays have no one truth value: two evidences are the same if they are one
class Evidence:
    """What was measured of one recipe, in a duel with the original on one machine.

    Args:
        split: which samples the scores are of, `select` or `certify`.
        batch: rows per timed call.
        rounds: (r, 2) seconds per call, the median of a block: [this recipe, the original], round by round; of a
            recipe whose time depends on what its inputs hold, the mean over a block's inputs.
        stolen: (r,) share of the processor's time that others took during each round; none is dropped.
        seconds: every timed call of this recipe in order (thinned evenly where there were very many).
        original_seconds: the original's calls in the same duel, likewise.
        scores: (n, k) per-sample statistics of the metric.
        original_scores: (n, k) the original's, of the same samples in the same order.
        metric: name; `higher_is_better` its direction.
        load_seconds: from the files to the first answer, in a fresh process.
        peak_bytes: the most memory that the process held beyond an empty Python process.
        original_peak_bytes: the original's.
        disk_bytes: the artifact's size.
        machine: key of the machine.
    """

    split: str
    batch: int
    rounds: Floats
    stolen: Floats
    seconds: Floats
    original_seconds: Floats
    scores: Floats
    original_scores: Floats
    metric: str
    higher_is_better: bool
    load_seconds: float
    peak_bytes: int
    original_peak_bytes: int
    disk_bytes: int
    original_disk_bytes: int
    machine: str

    @cached_property
    def speedup(self) -> Interval:
        """Times faster than the original: the median over rounds of the ratio within a round, and a process's luck."""
        return median_interval(self.rounds[:, 1] / self.rounds[:, 0]).widened(LUCK)

    def latency(self, quantile: float = 0.5) -> Interval:
        """Seconds per call at a quantile."""
        return self._latency("seconds", quantile)

    def original_latency(self, quantile: float = 0.5) -> Interval:
        """The original's seconds per call at a quantile, in the same duel."""
        return self._latency("original_seconds", quantile)

    def _latency(self, whose: str, quantile: float) -> Interval:
        if (whose, quantile) not in self._latencies:
            self._latencies[whose, quantile] = quantile_interval(getattr(self, whose), quantile)
        return self._latencies[whose, quantile]

    @cached_property
    def _latencies(self) -> dict[tuple[str, float], Interval]:
        return {}  # the search asks for the same few for every proposal

    @cached_property
    def throughput(self) -> Interval:
        """Rows per second, one caller, this batch."""
        return median_interval(self.rounds[:, 0]).map(lambda seconds: self.batch / seconds)

    @cached_property
    def quality(self) -> Interval:
        """The metric's value on the split."""
        value = self._value
        return paired_bootstrap(self.scores, self.original_scores, lambda ours, theirs: value(ours))

    @cached_property
    def original_quality(self) -> Interval:
        value = self._value
        return paired_bootstrap(self.scores, self.original_scores, lambda ours, theirs: value(theirs))

    @cached_property
    def drop(self) -> Interval:
        """How much worse than the original, in the metric's own unit; negative where better."""
        value, sign = self._value, 1 if self.higher_is_better else -1
        return paired_bootstrap(
            self.scores, self.original_scores, lambda ours, theirs: sign * (value(theirs) - value(ours))
        )

    @cached_property
    def relative_drop(self) -> Interval:
        """How much worse than the original as a share of the original's value; 0.01 is 1 %."""
        value, sign = self._value, 1 if self.higher_is_better else -1

        def share(ours: Floats, theirs: Floats) -> Floats:
            before = value(theirs)
            return sign * (before - value(ours)) / np.maximum(np.abs(before), 1e-12)

        return paired_bootstrap(self.scores, self.original_scores, share)

    def clearly_faster_than(self, other: Evidence) -> bool:
        """Whether the two speedups' intervals do not even touch."""
        return self.speedup.low > other.speedup.high

    def with_rounds(self, rounds: Floats, stolen: Floats, seconds: Floats, original_seconds: Floats) -> Evidence:
        """The same with the rounds of one more duel of these files."""
        return replace(
            self,
            rounds=np.concatenate([self.rounds, rounds]),
            stolen=np.concatenate([self.stolen, stolen]),
            seconds=thin(np.concatenate([self.seconds, seconds])),
            original_seconds=thin(np.concatenate([self.original_seconds, original_seconds])),
        )

    def same_contest(self, other: Evidence) -> bool:
        """Whether both were timed in the very same rounds, against the same calls of the original."""
        return np.array_equal(self.rounds[:, 1], other.rounds[:, 1])

    def doubts(self) -> tuple[str, ...]:
        """What a careful reader would doubt in these figures; empty where nothing is."""
        found = []
        if len(self.rounds) < FEW_ROUNDS:
            found.append(f"only {len(self.rounds)} rounds")
        disturbed = int((self.stolen > STOLEN_SHARE).sum())
        if disturbed:
            found.append(f"other programs took processor time in {disturbed} of {len(self.rounds)} rounds")
        half = len(self.rounds) // 2
        if half:
            ratio = float(np.median(self.rounds[:half, 1]) / np.median(self.rounds[half:, 1]))
            if abs(ratio - 1) > DRIFT:
                found.append(f"the original's own speed drifted by {abs(ratio - 1):.0%}")
        if self.speedup.width > 0.2:
            found.append(f"the speedup is known to {self.speedup.width / 2:.0%} only")
        return tuple(found)

    @property
    def _value(self) -> Any:
        known: Metric | None = METRICS.get(self.metric)
        return known.value if known else lambda means: means[..., 0]

    def to_json(self) -> dict[str, Any]:
        return {k: pack(v) if isinstance(v, np.ndarray) else v for k, v in vars(self).items() if k in ARGUMENTS}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evidence:
        values: dict[str, Any] = {k: unpack(v) if isinstance(v, dict) else v for k, v in data.items()}
        return cls(**values)

    def summary(self) -> dict[str, Any]:
        """The derived figures as JSON: what a reader of the manifest sees."""
        return {
            "split": self.split,
            "batch": self.batch,
            "rounds": len(self.rounds),
            "samples": len(self.scores),
            "speedup": self.speedup.to_json(),
            "latency_seconds": {f"p{round(q * 100)}": self.latency(q).to_json() for q in (0.5, 0.95, 0.99)},
            "throughput_per_second": self.throughput.to_json(),
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "quality": self.quality.to_json(),
            "drop": self.drop.to_json(),
            "relative_drop": self.relative_drop.to_json(),
            "load_seconds": self.load_seconds,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "machine": self.machine,
            "doubts": list(self.doubts()),
        }


ARGUMENTS = tuple(Evidence.__dataclass_fields__)


@dataclass(frozen=True)
class Verified:
    """A recipe that works: its files and what was measured of them."""

    artifact: Artifact
    evidence: Evidence


@dataclass(frozen=True)
class Refused:
    """A recipe that was turned away, and why.

    `step` is the number of the step that refused, where one did (`len(steps)` for the backend).  `evidence` is
    there where it was scored before it was turned away, and `speedup` where it was at least timed.
    """

    reason: Reason
    detail: str
    step: int | None = None
    evidence: Evidence | None = None
    speedup: Interval | None = None


@dataclass(frozen=True)
class Trial:
    """What happened to a recipe: one line of the journal.

    `seconds` is what the attempt took; `log` what each step said of its own work, such as layers kept in float.
    """

    recipe: Recipe
    outcome: Verified | Refused
    seconds: float = 0.0
    log: tuple[str, ...] = field(default=())

    @property
    def verified(self) -> Verified | None:
        return self.outcome if isinstance(self.outcome, Verified) else None

    @property
    def evidence(self) -> Evidence | None:
        return self.outcome.evidence

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "recipe": self.recipe.to_json(),
            "key": self.recipe.key,
            "seconds": round(self.seconds, 3),
        }
        data["log"] = list(self.log)
        if isinstance(self.outcome, Verified):
            data["verified"] = {
                "artifact": self.outcome.artifact.to_json(),
                "evidence": self.outcome.evidence.to_json(),
            }
        else:
            data["refused"] = {
                "reason": self.outcome.reason.name,
                "detail": self.outcome.detail,
                "step": self.outcome.step,
                "speedup": self.outcome.speedup.to_json() if self.outcome.speedup else None,
                "evidence": self.outcome.evidence.to_json() if self.outcome.evidence else None,
            }
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any], recipe: Recipe | None = None) -> Trial:
        """The trial of its JSON.

        Args:
            recipe: stands for the one in the data, where a plugin of it is not installed (`plugins.stored_recipe`).

        Raises:
            BrokenPluginError: a technique, backend or knob is not known here.
        """
        outcome: Verified | Refused
        if (verified := data.get("verified")) is not None:
            outcome = Verified(Artifact.from_json(verified["artifact"]), Evidence.from_json(verified["evidence"]))
        else:
            refused = data["refused"]
            evidence = Evidence.from_json(refused["evidence"]) if refused["evidence"] else None
            speedup = Interval.from_json(refused["speedup"]) if refused["speedup"] else None
            outcome = Refused(Reason[refused["reason"]], refused["detail"], refused["step"], evidence, speedup)
        recipe = recipe or recipe_from_json(data["recipe"])
        return cls(recipe, outcome, data["seconds"], tuple(data["log"]))


def thin(values: Floats | Sequence[float], most: int = 4000) -> Floats:
    """At most `most` of the values, evenly spaced in order; the largest is always kept, for tails are not noise."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) <= most:
        return values
    index = np.union1d(np.linspace(0, len(values) - 1, most - 1).astype(int), [int(values.argmax())])
    return values[index]


def pack(array: Floats) -> dict[str, Any]:
    """An array as JSON: float32, zlib, base64."""
    data = np.ascontiguousarray(array, dtype="<f4")
    return {"shape": list(array.shape), "f4": base64.b64encode(zlib.compress(data.tobytes(), 6)).decode()}


def unpack(data: dict[str, Any]) -> Floats:
    """The array of its JSON.

    Raises:
        ValueError: the bytes do not fill the shape.
    """
    count = int(np.prod(data["shape"], dtype=np.int64))
    limit = zlib.decompressobj()
    raw = limit.decompress(base64.b64decode(data["f4"], validate=True), 4 * count + 1)
    if len(raw) != 4 * count:
        raise ValueError(f"{data['shape']} needs {4 * count} bytes, but the array holds {len(raw)}")
    return np.frombuffer(raw, dtype="<f4").reshape(data["shape"]).astype(np.float64)
