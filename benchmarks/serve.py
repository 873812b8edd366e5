"""Everything that is asked of the runtime and the server, on one ladder and in one run, part by part.

ACCELERANDO_BENCH_PARTS names those that are wanted, by their first words.  Only a whole run at full scale is recorded.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable

from benchmarks import bursts, disturbed, goals, overload, reload, resident, wire
from benchmarks.figures import SCALE, Figure, Found, held_against
from benchmarks.ladders import Ground
from benchmarks.results import record

PARTS: dict[str, Callable[[Ground], Found]] = {
    "calls": wire.overheads,
    "goals": goals.changed,
    "overload": overload.overloaded,
    "reload": reload.swapped,
    "memory": resident.held,
    "bad rung": disturbed.caught,
    "bursts": bursts.usual,
    "violent bursts": bursts.violent,
}
WANTED = os.environ.get("ACCELERANDO_BENCH_PARTS", "")
REQUESTS = "Requests per second are measured by `scripts/bench requests`, in a section of their own."


def run(name: str) -> None:
    ground, figures, texts = Ground.prepared(), list[Figure](), list[str]()
    parts = {n: part for n, part in PARTS.items() if not WANTED or n in WANTED.split(",")}
    for number, (title, part) in enumerate(parts.items(), 1):
        start = time.monotonic()
        found = outcome(title, part, ground)
        figures += found.figures
        texts.append(found.text)
        print(f"\n--- {title}: {time.monotonic() - start:.0f} s\n{held_against(list(found.figures))}\n\n{found.text}")
        if SCALE == 1 and not WANTED:  # what was measured is kept, also where a later part never ends
            rest = f" ({number} of {len(parts)} parts)" if number < len(parts) else ""
            body = "\n\n".join([held_against(figures), REQUESTS, *texts])
            record(name, f"The governor and the server on a ladder of the ViT{rest}", body)


def outcome(title: str, part: Callable[[Ground], Found], ground: Ground) -> Found:
    """What a part found; where it failed, that, and the others go on."""
    try:
        return part(ground)
    except Exception as error:  # noqa: BLE001  whatever it is, it stands in the part's place
        traceback.print_exc()
        return Found((Figure(title, f"failed: {type(error).__name__}", "", False),), f"{title} failed: {error}")
