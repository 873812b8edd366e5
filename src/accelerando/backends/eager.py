"""PyTorch as it is: the original, and what every speedup is a multiple of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelerando.errors import ModelError, Reason, RefusalError
from accelerando.machine import Machine
from accelerando.recipe import Artifact, Backend, Runner
from accelerando.signature import Array, Signature, flatten, to_numpy
from accelerando.workload import Form, Model


@dataclass(frozen=True)
class Eager(Backend):
    """Run the user's own module, with the weights from the folder.

    As fast as its owner could call it: inference mode, and no copy of inputs unless the module writes into them.
    The number of threads is the process's own.

    Args:
        threads: threads within an operator; 0 is torch's own choice.
        channels_last: images and convolution weights lie channels last, which some convolutions prefer.
    """

    threads: int = 0
    channels_last: bool = False

    takes: ClassVar[frozenset[Form]] = frozenset({Form.TORCH})
    portable: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError(f"threads must be 0 or more, but is {self.threads}")

    @classmethod
    def choices(cls, model: Model, machine: Machine) -> Iterable[Eager]:
        plain = cls()
        yield plain
        for threads in machine.thread_counts:
            yield replace(plain, threads=threads)
        if _why_not_channels_last(model) is None:
            yield replace(plain, channels_last=True)

    def refuse(self, model: Model, machine: Machine) -> RefusalError | None:
        if self.channels_last and (why := _why_not_channels_last(model)):
            return RefusalError(Reason.NOTHING_TO_DO, why)
        return None

    def compile(self, model: Model, folder: Path) -> Artifact:
        """Write the state dict as `weights.safetensors`; its metadata names tensors that are shared.

        Raises:
            RefusalError: a weight is of a kind that safetensors does not hold, such as a sparse tensor.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {}
        shared: dict[str, str] = {}
        firsts: dict[Any, str] = {}
        try:
            for name, tensor in _tensors_of(model.content).items():
                place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                first = firsts.setdefault(place, name) if tensor.numel() else name
                if first == name:
                    tensors[name] = tensor.detach().clone().contiguous()
                else:
                    shared[name] = first
            save_file(tensors, folder / "weights.safetensors", metadata=shared or None)
        except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            raise RefusalError(Reason.UNSUPPORTED, f"its weights can't be written: {error}") from error
        return Artifact.gather(folder)

    def load(self, artifact: Artifact, folder: Path, signature: Signature, skeleton: Any = None) -> Runner:
        """The module with its weights.

        Raises:
            ModelError: no module is given, or another than the weights are from.
        """
        import torch
        from safetensors import safe_open

        if skeleton is None:
            raise ModelError("eager runs the user's own module, but none was given; pass it as model=")
        if self.threads:
            torch.set_num_threads(self.threads)
        with safe_open(folder / "weights.safetensors", framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a dict
            state |= {name: state[first] for name, first in (file.metadata() or {}).items() if first in state}
        module = copy.deepcopy(skeleton).cpu().eval().requires_grad_(False)
        extra = {k: v for k, v in module.state_dict().items() if not isinstance(v, torch.Tensor)}
        try:
            module.load_state_dict({**extra, **state}, strict=True)
        except RuntimeError as error:
            raise ModelError(f"the module given is not the one that was optimized: {error}") from error
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
        return _Module(module, signature, self.channels_last)


class _Module(Runner):
    """A module in inference mode.  As thread-safe as the module is."""

    def __init__(self, module: Any, signature: Signature, channels_last: bool) -> None:
        import torch

        self._torch, self._signature, self._channels_last = torch, signature, channels_last
        self._call = _caller(module, signature)
        self._guard: Callable[[], Any] = torch.inference_mode
        self._copies: bool | None = None  # whether the module writes into its inputs; unknown before the first call

    def __call__(self, leaves: Sequence[Array]) -> list[Array]:
        if self._copies is None:
            return self._first(leaves)
        from_numpy = self._torch.from_numpy
        owned = not self._copies
        tensors = [from_numpy(x if owned and x.flags.carray else np.array(x, order="C")) for x in leaves]
        return self._answer(tensors)

    def _answer(self, tensors: list[Any]) -> list[Array]:
        if self._channels_last:
            last = self._torch.channels_last
            tensors = [t.contiguous(memory_format=last) if t.ndim == 4 else t for t in tensors]
        with self._guard():
            answer = self._call(tensors)
        if isinstance(answer, self._torch.Tensor):
            return [_array(answer)]
        return [_array(x) for x in flatten(answer)[0]]

    def _first(self, leaves: Sequence[Array]) -> list[Array]:
        """Answer from copies, and see what the module does to them."""
        tensors = [self._torch.from_numpy(np.array(x)) for x in leaves]
        try:
            answer = self._answer(tensors)
        except RuntimeError:
            self._guard = self._torch.no_grad  # it may take gradients inside, as models of forces do
            tensors = [self._torch.from_numpy(np.array(x)) for x in leaves]
            answer = self._answer(tensors)
        self._copies = any(t._version for t in tensors)
        return answer


def _caller(module: Any, signature: Signature) -> Callable[[list[Any]], Any]:
    """The module's call from flat tensors; without detours where all are passed by position."""
    plain = [{"leaf": i} for i in range(len(signature.inputs))]
    if list(signature.arguments.values()) == plain and signature.positional == len(plain):
        return lambda tensors: module(*tensors)

    def call(tensors: list[Any]) -> Any:
        args, kwargs = signature.call(tensors)
        return module(*args, **kwargs)

    return call


def _array(tensor: Any) -> Array:
    """A tensor's array, by the shortest way there is."""
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError, AttributeError):  # it has a gradient, or a type that numpy lacks
        return to_numpy(tensor)


def _tensors_of(module: Any) -> dict[str, Any]:
    """The tensors of a state dict; what else a module puts there stays with the module."""
    return {name: value for name, value in module.state_dict().items() if hasattr(value, "data_ptr")}


def _why_not_channels_last(model: Model) -> str | None:
    if model.form is not Form.TORCH:
        return None
    import torch

    if not any(len(port.shape) == 4 for port in model.signature.inputs):
        return "no input is a batch of images (4 axes)"
    if not any(isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)) for m in model.content.modules()):
        return "it has no two-dimensional convolution"
    return None
