"""TorchInductor, ahead of time: the exported program as a library of compiled C++."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelerando.errors import Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Runner
from accelerando.signature import Array, Signature, to_numpy
from accelerando.workload import Form, Model

WRITES = "ACCELERANDO_WRITES_INPUTS"  # set in the package where the program writes into its inputs


@dataclass(frozen=True)
class Inductor(Backend):
    """Compile with AOTInductor into a package that torch loads; needs a C++ compiler here, and none to run.

    What was compiled holds the instructions of this processor and this number of threads: it does not run on a
    processor without them.  Freezing was tried and left out: it changed nothing for ahead-of-time packages.

    Args:
        threads: threads within a kernel; 0 is torch's own choice on the machine that compiles.
        max_autotune: also try templates for matrix products, and keep the fastest; it takes minutes.
    """

    threads: int = 0
    max_autotune: bool = False

    takes: ClassVar[frozenset[Form]] = frozenset({Form.EXPORTED})
    needs: ClassVar[tuple[str, ...]] = ("torch",)
    typical_seconds: ClassVar[float] = 40.0

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads must be 0 or more, but is {self.threads}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Inductor]:
        """Few: each takes most of a minute to compile."""
        plain = cls()
        yield plain
        if machine.cores > 1:
            yield replace(plain, threads=1)
        yield replace(plain, max_autotune=True)

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        compiler = _compiler()
        if shutil.which(compiler) is None:
            return RefusalError(
                Reason.MISSING_TOOL,
                f"the C++ compiler {compiler!r} is not found: `apt-get install g++`, `dnf install gcc-c++` or "
                "`xcode-select --install`, or name another in the environment variable CXX",
            )
        return None

    def compile(self, model: Model, folder: Path) -> Artifact:
        """Write `model.pt2`.

        Raises:
            RefusalError: there is no C++ compiler, or the program can't be compiled.
        """
        if refusal := self.refuse(model, Machine.look()):
            raise refusal
        import torch
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.utils import fresh_cache

        program = model.content
        settings: dict[str, Any] = {
            "cpp.threads": self.threads or torch.get_num_threads(),
            "max_autotune": self.max_autotune,
        }
        # Caches go where this build goes: a shared one would make the second build look cheap, and would stay.
        # Only precompiled headers stay, where torch keeps them among temporary files: no model is in them.
        with tempfile.TemporaryDirectory(prefix="inductor-", dir=folder.parent) as cache, _quiet():
            try:
                with fresh_cache(dir=cache):
                    settings["aot_inductor.metadata"] = {WRITES: str(int(_writes_inputs(program)))}
                    path = folder / "model.pt2"
                    aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
            except Exception as error:
                raise RefusalError(Reason.UNSUPPORTED, f"AOTInductor does not compile it: {error}") from error
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        with _quiet():
            package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
        return _Package(package, package.get_metadata().get(WRITES) == "1")


class _Package(Runner):
    """A loaded package.  Thread-safe: callers take turns."""

    def __init__(self, package: Any, copies: bool) -> None:
        import torch

        self._package, self._copies = package, copies
        # Inputs and outputs are flat already, and the package's own call parses its description of them each time.
        self._run, self._from_numpy = package.loader.boxed_run, torch.from_numpy

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        owned = not self._copies
        inputs = [self._from_numpy(x if owned and x.flags.carray else np.array(x, order="C")) for x in leaves]
        return [to_numpy(y) for y in self._run(inputs)]


def _writes_inputs(program: Any) -> bool:
    """Whether the program writes into its inputs; only its functional form tells."""
    return bool(program.run_decompositions({}).graph_signature.user_inputs_to_mutate)


def _compiler() -> str:
    """The C++ compiler that torch would call."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's warnings, logs and tables of autotuning."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
