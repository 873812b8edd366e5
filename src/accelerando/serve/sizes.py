"""What rungs hold of memory, as far as their certificates tell.

What rungs share, such as a backend's library, counts once: of each backend the least that any of its rungs took beyond
its own files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from accelerando.ladder import Rung


@dataclass(frozen=True)
class Holding:
    """Bytes that some rungs hold: of libraries, by backend, and of their own."""

    libraries: Counter[str]
    own: int

    @property
    def bytes(self) -> int:
        return self.libraries.total() + self.own

    def beside(self, other: Holding, *, shared: bool) -> Holding:
        """This with what others hold; where libraries are `shared`, as in one process, those of both are the same."""
        libraries = self.libraries | other.libraries if shared else self.libraries + other.libraries
        return Holding(libraries, self.own + other.own)


class Sizes:
    """What each rung of a ladder holds."""

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self._rungs = rungs
        self._libraries: dict[str, int] = {}
        for rung in rungs:
            name, beyond = rung.recipe.backend.name, max(rung.evidence.peak_bytes - rung.artifact.bytes, 0)
            self._libraries[name] = min(self._libraries.get(name, beyond), beyond)

    def added(self, number: int) -> int:
        """What a rung adds to those that are loaded, in bytes."""
        rung = self._rungs[number]
        return max(rung.evidence.peak_bytes - self._libraries[rung.recipe.backend.name], rung.artifact.bytes)

    def together(self, numbers: Iterable[int]) -> Holding:
        """What these rungs hold."""
        chosen = set(numbers)
        backends = {self._rungs[n].recipe.backend.name for n in chosen}
        return Holding(Counter({b: self._libraries[b] for b in backends}), sum(map(self.added, chosen)))
