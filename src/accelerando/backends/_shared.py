"""What several rungs of a process run is loaded once: the same files, with the same settings.

A cascade's member that is a rung by itself is one; so are the members of two cascades that differ by their threshold.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from threading import Lock

from accelerando.recipe import Artifact, Backend, Runner, key_of
from accelerando.signature import Array, Signature


class _Loaded:
    """A runner in memory, closed when nobody holds it any longer."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        weakref.finalize(self, runner.close).atexit = False


class _Share(Runner):
    """A hold on a runner that others may hold too: to close it is to let go."""

    def __init__(self, loaded: _Loaded) -> None:
        self._loaded: _Loaded | None = loaded

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        loaded = self._loaded  # until this call is done, whoever closes it meanwhile
        return loaded.runner(leaves) if loaded else closed()

    def close(self) -> None:
        self._loaded = None


_lock = Lock()
_loaded: weakref.WeakValueDictionary[tuple[Backend, str], _Loaded] = weakref.WeakValueDictionary()


def load_once(backend: Backend, artifact: Artifact, signature: Signature, load: Callable[[], Runner]) -> Runner:
    """A runner of these files with these settings; where it is to be `shared`, the one that is in memory already.

    One is loaded at a time, so that two threads do not load the same.

    Args:
        backend: whose runners are thread-safe, as `Backend.here` made it for this process.
        artifact: its files; their hashes were checked.
        load: makes the runner.
    """
    if not backend.settings.get("shared"):
        return load()
    key = backend, key_of([dict(backend.settings), artifact.to_json(), signature.to_json()])
    with _lock:
        loaded = _loaded.get(key)
        if loaded is None:
            loaded = _loaded[key] = _Loaded(load())
    return _Share(loaded)


def closed(*_: object) -> list[Array]:
    """In the place of what a runner ran.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("this runner was closed; load the rung again")
