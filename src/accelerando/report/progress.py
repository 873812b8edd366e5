"""What a person sees while the search runs: a few live lines on a terminal, plain lines when piped.

It must never break the search: a terminal that goes away, or that can't show a character, costs the lines and
nothing else.  It draws once a second at most, for the cores belong to what is being measured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.errors import LiveError
from rich.live import Live
from rich.table import Table
from rich.text import Text

from accelerando.recipe import Recipe
from accelerando.report import words
from accelerando.report.healing import only_measured
from accelerando.trial import Trial

LESSON = re.compile(r"\d+ of \d+ s\b")  # how far a lesson is: it takes minutes, so it is worth a line when piped
LESSON_LINES, LESSON_WIDTH = 20.0, 120  # seconds between such lines, and their characters
PER_SECOND = 1  # redraws; each takes about a millisecond of one core


class Watcher(Protocol):
    """What the search tells; `Progress` shows it, `Quiet` does not."""

    def __enter__(self) -> Watcher: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def phase(self, name: str) -> None: ...
    def trying(self, recipe: Recipe, doing: str) -> None: ...
    def found(self, trial: Trial, best: Trial | None) -> None: ...
    def note(self, text: str) -> None: ...


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, name: str) -> None:
        """A new part of the work begins."""

    def trying(self, recipe: Recipe, doing: str) -> None:
        """A recipe is being built or measured."""

    def found(self, trial: Trial, best: Trial | None) -> None:
        """A trial ended; `best` is the best so far."""

    def note(self, text: str) -> None:
        """Something that the user should know."""


class Progress:
    """Shows what is being tried, the best so far, how many were tried and turned away, and the time used.

    On a terminal these are three live lines; elsewhere a line is printed for each phase, note and new best, and now
    and then for how far a lesson is.

    Args:
        budget_seconds: what may be used, or None.
        console: where; standard error by default, so that standard output stays the caller's.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        budget_seconds: float | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = forgiving(console or Console(stderr=True))
        self._clock = clock
        self._budget = budget_seconds
        self._start = clock()
        self._phase, self._now = "", ""
        self._best: Trial | None = None
        self._outcomes: dict[str, str] = {}  # by recipe: a recipe that is measured again counts once
        self._said = -LESSON_LINES  # when the last line was printed
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._start = self._clock()
        if self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.is_jupyter:
            live = Live(
                get_renderable=self._lines, console=self._console, refresh_per_second=PER_SECOND, transient=True
            )
            try:
                live.start()
                self._live = live
            except LiveError:
                pass  # the caller shows something live already: plain lines then
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._say(self._counts())

    def phase(self, name: str) -> None:
        """A new part of the work begins."""
        before, self._phase = self._phase, words.shorten(name, 60)
        if self._live is None and self._phase != before:
            self._say(Text(f"[{self._elapsed()}] {self._phase}"))

    def trying(self, recipe: Recipe, doing: str) -> None:
        """A recipe is being built or measured; only shown live, but for how far a lesson is."""
        doing, said = words.shorten(doing, 50), words.recipe(recipe)
        self._now = f"{doing}: {said}"
        if self._live is None and LESSON.search(doing) and self._clock() - self._said >= LESSON_LINES:
            line = f"[{self._elapsed()}] {doing}{self._left()}: {said}"
            self._say(Text(words.shorten(line, LESSON_WIDTH)))

    def found(self, trial: Trial, best: Trial | None) -> None:
        """A trial ended.  A new best is worth a line that stays; a refusal is not."""
        self._outcomes[trial.recipe.key] = (
            "verified" if trial.verified else "measured" if only_measured(trial) else "turned away"
        )
        before = self._best.recipe.key if self._best else None
        self._best = best
        if best is not None and best.recipe.key != before:
            self._say(Text(f"[{self._elapsed()}] best so far: {describe(best)}"))

    def note(self, text: str) -> None:
        """Something that the user should know; it stays."""
        self._say(Text(f"[{self._elapsed()}] {words.shorten(text, 400)}"))

    def _say(self, line: Text) -> None:
        self._said = self._clock()
        self._console.print(line, soft_wrap=self._live is None)

    def _elapsed(self) -> str:
        whole = int(self._clock() - self._start)
        return f"{whole // 60}:{whole % 60:02d}"

    def _counts(self) -> Text:
        budget = f" of {words.duration(self._budget)}" if self._budget else ""
        spent = words.duration(self._clock() - self._start)
        became = list(self._outcomes.values())
        shapes = f", {words.count(became.count('measured'), 'shape')} measured" if "measured" in became else ""
        return Text(f"{len(became)} tried, {became.count('turned away')} turned away{shapes}, {spent}{budget}")

    def _left(self) -> str:
        """What is left of the budget: `, 17 min 55 s left`."""
        left = self._budget - (self._clock() - self._start) if self._budget else 0.0
        return f", {words.duration(round(left))} left" if left > 0 else ""

    def _lines(self) -> RenderableType:
        """The live lines, each cut to the terminal's width."""
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        grid.add_row("now", Text(self._now or self._phase or "getting ready"))
        grid.add_row("best", Text(describe(self._best) if self._best else "none yet", style="bold green"))
        grid.add_row("time", self._counts().append(f"{self._left()}   {self._phase}", style="dim"))
        return Group(grid)


def describe(trial: Trial) -> str:
    """A measured trial in one line: how fast, what it loses, and what it is."""
    evidence = trial.evidence
    if evidence is None:
        return words.recipe(trial.recipe)
    speed = words.between(evidence.speedup, words.times)
    return f"{speed}, drop {words.drop(evidence.metric, evidence.drop)}, {words.recipe(trial.recipe)}"


# --- a stream that never raises ---------------------------------------------------------------------------------


class _Forgiving:
    """A text stream that goes silent where the one below is closed, broken or can't encode a character."""

    def __init__(self, below: IO[str]) -> None:
        self._below: IO[str] | None = below

    def write(self, text: str) -> int:
        if self._below is not None:
            try:
                encoding = getattr(self._below, "encoding", None) or "utf-8"
                self._below.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError, LookupError):
                self._below = None
        return len(text)

    def flush(self) -> None:
        if self._below is not None:
            try:
                self._below.flush()
            except (OSError, ValueError):
                self._below = None

    def __getattr__(self, name: str) -> Any:
        if self._below is None and name == "isatty":
            return lambda: False
        return getattr(self._below, name)


def forgiving(console: Console) -> Console:
    """The same console on a stream that never raises."""
    stream: Any = _Forgiving(console.file)
    return Console(
        file=stream,
        width=None if console.is_terminal else console.width,
        force_terminal=console.is_terminal,
        force_jupyter=False,
        no_color=console.no_color,
        highlight=False,
    )
