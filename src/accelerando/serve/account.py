"""What a governed model tells about itself, gathered from those who know."""

from __future__ import annotations

import math

from accelerando.serve.aims import orientation
from accelerando.serve.company import Company
from accelerando.serve.conductor import Conductor
from accelerando.serve.status import RungStatus, Status


def status_of(name: str, conductor: Conductor) -> Status:
    """A model of this name, as it is now: plain data."""
    company, tally = conductor.company, conductor.tally
    residents, bundle = company.residents, company.residents.bundle
    rate, slowdown, utilisation = conductor.figures()
    requests = tally.requests
    return Status(
        name=name,
        version=company.version,
        goal=str(company.aims.goal),
        metric=bundle.ladder.original.evidence.metric,
        rungs=tuple(_rung(company, number) for number in range(len(bundle.ladder))),
        standing=conductor.standing,
        stands=tuple(conductor.stands),
        queue_rows=conductor.waiting_rows,
        rate=rate,
        slowdown=slowdown,
        utilisation=utilisation,
        rows=tally.rows,
        all_rows=tally.all_rows,
        answered=requests["answered"],
        late=requests["late"],
        refused=requests["refused"],
        expired=requests["expired"],
        failed=requests["failed"],
        cancelled=requests["cancelled"],
        switches=tally.switches,
        attainment=tally.attainment,
        effective_quality=tally.effective_quality if orientation(bundle.ladder) > 0 else math.nan,
        queued=tally.queued,
        computed=tally.computed,
        memory_bytes=residents.memory,
        memory_cap=residents.cap,
        audited=company.watch.audited if company.watch else 0,
        batches=tally.batches,
        latest=tally.latest,
        losses=tally.losses,
        drift=company.drift.findings if company.drift else (),
    )


def _rung(company: Company, number: int) -> RungStatus:
    residents, resident = company.residents, company.residents[number]
    state = next((s for s in residents.states if s.number == number), None)
    return RungStatus(
        number, resident.text, resident.state, resident.why, resident.rung.quality, resident.rung.drop,
        resident.rung.speedup, state.seconds(1) if state else 0.0, residents.bytes_of(number),
        resident.answered, company.watch.agreement(number) if company.watch else None,
    )  # fmt: skip
