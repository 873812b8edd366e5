"""The journal `trials.jsonl`: one trial a line, appended and fsynced, a torn last line tolerated."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from accelerando.errors import BrokenPluginError
from accelerando.trial import Trial


@dataclass(frozen=True)
class Journal:
    """The history of a search, in a file that survives a `kill -9` with at most the running trial lost."""

    path: Path

    def append(self, trial: Trial) -> None:
        """Add one trial; on return it is on the disk.

        Raises:
            OSError: the disk is full or gone.
        """
        line = json.dumps(trial.to_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        whole = self._whole_bytes()
        with self.path.open("ab") as stream:
            stream.truncate(whole)  # what a torn write left behind would spoil this line too
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def read(self, machine: str | None = None) -> tuple[Trial, ...]:
        """The trials so far, in order; for a recipe that was tried again, all of them.

        Args:
            machine: key of the machine whose evidence counts; None for all.

        A line that is not a trial any more (another version's knob, a torn end) is left out: it will be tried anew.
        """
        if not self.path.exists():
            return ()
        trials = []
        for line in self.path.read_bytes()[: self._whole_bytes()].splitlines():
            try:
                trial = Trial.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, zlib.error, BrokenPluginError):
                continue
            if machine is None or trial.evidence is None or trial.evidence.machine == machine:
                trials.append(trial)
        return tuple(trials)

    def _whole_bytes(self) -> int:
        """Where the last whole line ends."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as stream:
            return stream.read().rfind(b"\n") + 1
