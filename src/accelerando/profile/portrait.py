"""The whole picture of a model on this machine: `Profile.take`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

from accelerando.errors import ModelError, UsageError
from accelerando.interval import Interval
from accelerando.machine import Machine
from accelerando.profile.ceilings import Ceilings
from accelerando.profile.growth import Growth
from accelerando.profile.layers import Layer, Look, Subject
from accelerando.profile.remedies import Help, Hint, helps, hints
from accelerando.profile.roofline import Roofs, Standing, least_seconds, least_seconds_int8, stand
from accelerando.workload import Form, Model, Samples

SCHEMA = 1
CEILINGS_SHARE, LOOK_SHARE = 0.3, 0.4  # of the time; growth gets what is left, and at least:
GROWTH_LEAST = 0.2
MOSTLY_STARTS = 50.0  # times its least time, from where headroom says nothing of kernels any more
PASSED = 1.1  # a layer this far above its roof says that the roof was measured on a busier machine


@dataclass(frozen=True)
class Profile:
    """Where a model's time and memory go, against what the machine could do.

    Args:
        form: `torch` or `onnx`; `name` the module's class or the file's name.
        batch: rows per call while the layers were looked at.
        look: the layers.
        ceilings: the machine's measured roofs.
        growth: time and memory against the batch; None where the batch is fixed.
        seconds: what taking it took.
    """

    form: str
    name: str
    batch: int
    machine: Machine
    look: Look
    ceilings: Ceilings
    growth: Growth | None
    seconds: float

    @classmethod
    def take(
        cls,
        model: Model,
        samples: Samples,
        machine: Machine,
        *,
        seconds: float = 20.0,
        batch: int = 1,
        ceilings: Ceilings | None = None,
    ) -> Profile:
        """Profile a model on some rows, in about this many seconds.

        The model is only called; hooks are taken off again, also after an error.  A call that is longer than a
        tenth of `seconds` is still timed three times.  `ceilings` that were measured before, on this machine, save
        measuring them again.

        Raises:
            UsageError: `seconds` or `batch` is not positive, or there are no samples.
            ModelError: the model is neither a torch module nor an ONNX file.
            MissingExtraError: torch, or for an ONNX model onnx, is not installed.
        """
        if not seconds > 0 or batch < 1 or not len(samples):
            raise UsageError(
                f"a profile needs seconds > 0, batch >= 1 and at least one sample, but got {seconds=}, {batch=} and "
                f"{len(samples)} samples"
            )
        begin = perf_counter()
        subject, name = _subject(model, samples)
        fixed = model.signature.fixed_batch
        batch = fixed or batch
        ceilings = ceilings or Ceilings.measure(machine, CEILINGS_SHARE * seconds)
        look = subject.look(batch, LOOK_SHARE * seconds)
        left = max(seconds - (perf_counter() - begin), GROWTH_LEAST * seconds)
        growth = None if fixed else Growth.measure(subject, machine, left)
        return cls(model.form.value, name, batch, machine, look, ceilings, growth, perf_counter() - begin)

    @cached_property
    def roofs(self) -> Roofs:
        start = "node" if self.form == Form.ONNX.value else "call"
        return Roofs.over(self.ceilings, self.machine, self.look, start)

    @cached_property
    def standings(self) -> tuple[Standing, ...]:
        """Where each layer stands under the roofs, in the order of the layers."""
        return tuple(stand(layer, self.roofs) for layer in self.look.layers)

    @cached_property
    def hints(self) -> tuple[tuple[Hint, ...], ...]:
        """What could help each layer, in the order of the layers."""
        pairs = zip(self.look.layers, self.standings, strict=True)
        return tuple(hints(layer, standing, self.roofs, self.form) for layer, standing in pairs)

    @property
    def helps(self) -> tuple[Help, ...]:
        """What could help the whole model, the largest share of its time first."""
        return helps(self.look.layers, self.hints, self.covered.mid)

    @property
    def covered(self) -> Interval:
        """The share of the time that the layers add up to; the rest is Python and glue between them."""
        return self.look.covered

    @property
    def least_seconds(self) -> float:
        """The least time that the model could take on this machine, in its own precision."""
        return least_seconds(self.standings)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One plain row per layer, the dearest first."""
        total = sum(layer.seconds.mid for layer in self.look.layers) or 1.0
        pairs = zip(self.look.layers, self.standings, self.hints, strict=True)
        rows = [
            {
                **layer.to_json(),
                "share": layer.seconds.mid / total,
                **standing.to_json(),
                "hint": "; ".join(f"{h.technique}: {h.why}" for h in found[:2]),
            }
            for layer, standing, found in pairs
        ]
        return sorted(rows, key=lambda row: -row["seconds"]["mid"])

    def doubts(self) -> tuple[str, ...]:
        """What a careful reader would doubt."""
        found = list(self.look.notes)
        passed = [s for s in self.standings if s.achieved > PASSED]
        if passed:
            found.append(
                f"{len(passed)} layers came out faster than their roof, which was measured on a busier machine"
            )
        if self.look.whole.width > 0.3:
            found.append(f"the model's own time is known to {self.look.whole.width / 2:.0%} only")
        return tuple(found)

    def answers(self) -> tuple[str, ...]:
        """The findings as sentences: the bottleneck, the headroom, the growth."""
        rows, found = self.rows, []
        if rows:
            top = rows[0]
            between = ", between its own layers" if top["container"] else ""
            found.append(
                f"the dearest layer is {top['name']} ({top['kind']}{between}): {top['share']:.0%} of the layers' time, "
                f"bound by {top['bound']}"
            )
            kinds: dict[str, list[float]] = {}
            for row in rows:
                kinds.setdefault(row["kind"], []).append(row["share"])
            kind, shares = max(kinds.items(), key=lambda item: sum(item[1]))
            if len(shares) > 1:
                found.append(f"the dearest kind is {kind}: {sum(shares):.0%} of it, in {len(shares)} layers")
        headroom = self.look.whole.mid / max(self.least_seconds, 1e-12)
        if headroom > MOSTLY_STARTS:
            found.append(f"its work is {1 / headroom:.2%} of its time by the measured roofs: the rest is starting it")
        else:
            found.append(
                f"by the measured roofs this machine could run it {headroom:.1f}x as fast at most as it is, and "
                f"{self.look.whole.mid / self._least_int8:.1f}x in int8"
            )
        return (*found, *(self.growth.words() if self.growth else ("the model takes one batch size only",)))

    @property
    def _least_int8(self) -> float:
        return max(least_seconds_int8(self.look.layers, self.roofs), 1e-12)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data: what was measured, and under `derived` what follows from it."""
        look = self.look
        return {
            "schema": SCHEMA,
            "form": self.form,
            "name": self.name,
            "batch": self.batch,
            "threads": look.threads,
            "seconds": self.seconds,
            "machine": self.machine.to_json(),
            "whole": look.whole.to_json(),
            "timed": look.timed.to_json(),
            "covered": look.covered.to_json(),
            "weight_bytes": look.weight_bytes,
            "peak_bytes": look.peak_bytes,
            "notes": list(look.notes),
            "layers": [layer.to_json() for layer in look.layers],
            "ceilings": self.ceilings.to_json(),
            "growth": self.growth.to_json() if self.growth else None,
            "derived": {
                "rows": self.rows,
                "least_seconds": self.least_seconds,
                "least_seconds_int8": self._least_int8,
                "outside": 1 - look.covered.mid,
                "flops": sum(layer.flops for layer in look.layers),
                "helps": [h.to_json() for h in self.helps],
                "doubts": list(self.doubts()),
                "answers": list(self.answers()),
            },
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """The profile of its JSON; what is derived is derived again.

        Raises:
            UsageError: it was written by another version.
        """
        if data.get("schema") != SCHEMA:
            raise UsageError(f"this profile has schema {data.get('schema')!r}, but {SCHEMA} must be: take it again")
        look = Look(
            tuple(Layer.from_json(x) for x in data["layers"]),
            Interval.from_json(data["whole"]),
            Interval.from_json(data["timed"]),
            Interval.from_json(data["covered"]),
            data["threads"],
            data["weight_bytes"],
            data["peak_bytes"],
            tuple(data["notes"]),
        )
        return cls(
            data["form"],
            data["name"],
            data["batch"],
            Machine.from_json(data["machine"]),
            look,
            Ceilings.from_json(data["ceilings"]),
            Growth.from_json(data["growth"]) if data["growth"] else None,
            data["seconds"],
        )


def _subject(model: Model, samples: Samples) -> tuple[Subject, str]:
    if model.form is Form.TORCH:
        from accelerando.profile.modules import Modules

        return Modules(model, samples), type(model.content).__name__
    if model.form is Form.ONNX:
        from accelerando.profile.nodes import Nodes

        return Nodes(model, samples), model.content.name
    raise ModelError(f"a profile takes a torch module or an ONNX file, but the model is in the form {model.form.value}")
