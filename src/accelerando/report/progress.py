"""What a person sees while the search runs: a few live lines on a terminal, plain lines when piped.

It must never break the search: a terminal that goes away, or that can't show a character, costs the lines and
nothing else.  It draws once a second at most, for the cores belong to what is being measured.
"""

from __future__ import annotations

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
from accelerando.trial import Trial

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

    On a terminal these are three live lines; elsewhere a line is printed for each phase, note and new best.

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
        self._outcomes: dict[str, bool] = {}  # by recipe: a recipe that is measured again counts once
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
        """A recipe is being built or measured; only shown live."""
        self._now = f"{words.shorten(doing, 30)}: {words.recipe(recipe)}"

    def found(self, trial: Trial, best: Trial | None) -> None:
        """A trial ended.  A new best is worth a line that stays; a refusal is not."""
        self._outcomes[trial.recipe.key] = trial.verified is not None
        before = self._best.recipe.key if self._best else None
        self._best = best
        if best is not None and best.recipe.key != before:
            self._say(Text(f"[{self._elapsed()}] best so far: {describe(best)}"))

    def note(self, text: str) -> None:
        """Something that the user should know; it stays."""
        self._say(Text(f"[{self._elapsed()}] {words.shorten(text, 400)}"))

    def _say(self, line: Text) -> None:
        self._console.print(line, soft_wrap=self._live is None)

    def _elapsed(self) -> str:
        whole = int(self._clock() - self._start)
        return f"{whole // 60}:{whole % 60:02d}"

    def _counts(self) -> Text:
        budget = f" of {words.duration(self._budget)}" if self._budget else ""
        spent = words.duration(self._clock() - self._start)
        tried, verified = len(self._outcomes), sum(self._outcomes.values())
        return Text(f"{tried} tried, {tried - verified} turned away, {spent}{budget}")

    def _lines(self) -> RenderableType:
        """The live lines, each cut to the terminal's width."""
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        grid.add_row("now", Text(self._now or self._phase or "getting ready"))
        grid.add_row("best", Text(describe(self._best) if self._best else "none yet", style="bold green"))
        grid.add_row("time", self._counts().append(f"   {self._phase}", style="dim"))
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
