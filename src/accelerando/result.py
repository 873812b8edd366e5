"""What `accelerate` gives back: the verdict, the ladder, and everything that was tried."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerando.bundle import Bundle
from accelerando.ladder import Rung


@dataclass(frozen=True)
class Result:
    """The outcome of a search; everything is read from its bundle.

    `print(result)` shows the verdict, the ladder, what was tried and why the rest was turned away.
    """

    bundle: Bundle

    @property
    def verdict(self) -> str:
        """`met`, `not met` or `cannot tell`."""
        return self.bundle.verdict.outcome.value

    @property
    def best(self) -> Rung:
        """The rung that answers the goal best; `best.speedup` and `best.drop` are intervals."""
        return self.bundle.ladder.rungs[self.bundle.best]

    @property
    def ladder(self) -> tuple[Rung, ...]:
        """All rungs, from the original to the fastest."""
        return self.bundle.ladder.rungs

    def report(self, path: str | Path) -> Path:
        """Write the HTML report, one self-contained page; gives its path."""
        from accelerando.report import page

        page.write(self.bundle, Path(path))
        return Path(path)

    def to_frame(self) -> Any:
        """A pandas DataFrame, one row for each trial.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        from accelerando.report import frame

        return frame.to_frame(self.bundle)

    def to_json(self) -> str:
        """The same rows as JSON text, with the verdict and the goal."""
        from accelerando.report import frame

        rows = frame.rows(self.bundle)
        return json.dumps({"verdict": self.verdict, "goal": str(self.bundle.goal), "trials": rows}, allow_nan=False)

    def __str__(self) -> str:
        from accelerando.report import text

        return text.render(self.bundle)

    def _repr_html_(self) -> str:
        from accelerando.report import page

        return page.fragment(self.bundle)
