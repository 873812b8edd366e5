"""A rung as the model repository of another server: for people who must stay on theirs.

    export_bundle("bundle/", "triton", "models/")             # the best rung
    export_bundle("bundle/", "ovms", "models/", rung=2)
    export_bundle("bundle/", "onnx", "plain/")

Everything is written beside its place, held against the bundle's stored rows, and put there as a whole, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.bundle import Bundle
from accelerando.disk import NO_ROOM
from accelerando.errors import BundleError, MissingExtraError, UsageError
from accelerando.interval import Interval
from accelerando.ladder import Rung
from accelerando.parity import Parity
from accelerando.plugins import StoredBackend
from accelerando.signature import Array, Port

TARGETS = ("triton", "ovms", "onnx")
MOST_ROWS = 64  # of a batch that Triton may put together
FILES = {"onnxruntime": ("model.onnx", "model.onnx.data"), "openvino": ("model.xml", "model.bin")}
# Why rungs of other backends stay here.
WHY_NOT = {
    "eager": "it runs the original's own Python code",
    "inductor": "it is native code for one machine, which only torch loads",
    "cascade": "it is two models with a rule of who answers, which no single model file holds",
    "onnxruntime_sparse": "its compressed matrices are fed to ONNX Runtime by this package's own code",
}
ORT_TYPES = {
    "float": "FP32", "float16": "FP16", "bfloat16": "BF16", "double": "FP64", "bool": "BOOL", "string": "STRING",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}  # fmt: skip
OPENVINO_TYPES = {
    "f32": "FP32", "f16": "FP16", "bf16": "BF16", "f64": "FP64", "boolean": "BOOL", "string": "STRING",
    **{f"{sign[0]}{bits}": f"{sign[1:]}INT{bits}" for sign in ("i", "uU") for bits in (8, 16, 32, 64)},
}  # fmt: skip
GRAPH_LEVELS = {"basic": -1, "extended": 1}  # as Triton counts them; all rewrites without a word


@dataclass(frozen=True)
class _Tensor:
    """An input or an output as the file has it: its type as Triton spells it, and its shape, -1 where it may change."""

    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Settings:
    """How a server is told to run a rung, in its own words; `lost` is what it can't be told."""

    given: Mapping[str, str]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class _Export:
    """One rung on its way out."""

    bundle: Bundle
    number: int
    name: str
    inputs: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]
    parity: Parity | None

    @property
    def rung(self) -> Rung:
        return self.bundle.ladder.rungs[self.number]

    @property
    def knobs(self) -> Mapping[str, Any]:
        return self.rung.recipe.backend.knobs


def export_bundle(
    bundle: Bundle | str | Path, to: str, folder: str | Path, rung: int | str | None = None, name: str | None = None
) -> list[Path]:
    """Write a rung for another server.

    Args:
        bundle: an opened one, or its folder.
        to: `triton` or `ovms` (a model repository with one model), or `onnx` (the plain file).
        folder: where to; must be empty, or not there yet.
        rung: its number on the ladder, negative from the fastest, or its recipe's key; the best without it.
        name: of the model; that of the bundle's folder without it.

    Returns:
        Every file that was written, in order of path.

    Raises:
        UsageError: there is no such target or rung, the folder holds something, or this rung can't be exported; the
            message names those that can.
        MissingExtraError: the library that reads the rung's files is not installed.
        BundleError: the files are damaged, they don't answer the stored rows as the rung did, or the disk is full.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle, hashes=False)
    folder = Path(folder)
    name = _plain_name(bundle.path.resolve().name) if name is None else name
    if to not in TARGETS:
        raise UsageError(f"there is no target {to!r}; give one of {', '.join(TARGETS)}")
    if name != _plain_name(name):
        raise UsageError(f"a model's name must be of letters, digits, '_', '-' and '.', but is {name!r}")
    number = _number(bundle, rung)
    chosen = bundle.ladder.rungs[number]
    if why := _why_not(chosen, to):
        raise UsageError(f"rung {number}, {chosen.recipe}, can't be exported: {why}; {_way_out(bundle, to)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} holds something already; give a folder that is empty or not there yet")
    bundle.check_rung(chosen)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        _write(bundle, number, to, beside, name)
        if folder.exists():
            folder.rmdir()
        beside.replace(folder)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise BundleError(
                "no-room", f"there is no room for {folder}: {error.strerror}; nothing is written"
            ) from error
        raise UsageError(f"{folder} can't be written: {error}; nothing is written") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write(bundle: Bundle, number: int, to: str, root: Path, name: str) -> None:
    rung = bundle.ladder.rungs[number]
    place = root if to == "onnx" else root / name / "1"
    place.mkdir(parents=True, exist_ok=True)
    for file in rung.artifact.files:
        if file.path in FILES[rung.recipe.backend.name]:
            shutil.copyfile(bundle.folder(rung) / file.path, place / file.path)
    inputs, outputs = _tensors(place)
    export = _Export(bundle, number, name, inputs, outputs, bundle.parity)
    remarks = _checked(export, place, to)
    if to == "triton":
        settings = _triton_settings(export)
        (root / name / "config.pbtxt").write_text(_triton_config(export, settings), encoding="utf-8")
    elif to == "ovms":
        settings = _ovms_settings(export)
        config = {"name": name, "base_path": name, "plugin_config": settings.given}
        (root / "config.json").write_text(json.dumps({"model_config_list": [{"config": config}]}, indent=2) + "\n")
    else:
        settings = _Settings({k: str(v) for k, v in export.knobs.items()}, ())
    if export.parity and export.rung.recipe.key in export.parity.rungs:
        _write_sample(export, export.parity, root / "sample.npz")
    (root / "README.md").write_text(_readme(export, to, settings, remarks), encoding="utf-8")


# --- which rung -------------------------------------------------------------------------------------------------


def _number(bundle: Bundle, rung: int | str | None) -> int:
    rungs = bundle.ladder.rungs
    keys = [r.recipe.key for r in rungs]
    if rung is None:
        return bundle.best
    if isinstance(rung, str) and rung in keys:
        return keys.index(rung)
    if isinstance(rung, int) and not isinstance(rung, bool) and -len(rungs) <= rung < len(rungs):
        return rung % len(rungs)
    there = ", ".join(f"{i} ({r.recipe.key}: {r.recipe})" for i, r in enumerate(rungs))
    raise UsageError(f"there is no rung {rung!r} in {bundle.path}; give the number or the key of one: {there}")


def _why_not(rung: Rung, to: str) -> str:
    """Why a rung can't go there; empty where it can."""
    backend = rung.recipe.backend.name
    if isinstance(rung.recipe.backend, StoredBackend):
        return rung.recipe.backend.why
    if backend not in FILES:
        return WHY_NOT.get(backend, f"files of the backend {backend} are known to this package only")
    if backend == "openvino" and to == "onnx":
        return "it is an OpenVINO model, which can't be turned back into ONNX (triton and ovms take it)"
    return ""


def _way_out(bundle: Bundle, to: str) -> str:
    fit = [f"{i} ({r.recipe})" for i, r in enumerate(bundle.ladder.rungs) if not _why_not(r, to)]
    if fit:
        return f"give the number of a rung that can: {', '.join(fit)}"
    return "no rung of this bundle can: keep to `accelerando serve`, or make a bundle whose ladder has an ONNX rung"


def _plain_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("._") or "model"


# --- what the files say -----------------------------------------------------------------------------------------


def _tensors(place: Path) -> tuple[tuple[_Tensor, ...], tuple[_Tensor, ...]]:
    """The inputs and outputs of the model in a folder, as the file itself has them."""
    if (place / "model.onnx").exists():
        session = _session(place / "model.onnx")
        return tuple(map(_onnx_tensor, session.get_inputs())), tuple(map(_onnx_tensor, session.get_outputs()))
    graph = _openvino().Core().read_model(place / "model.xml")
    return tuple(map(_openvino_tensor, graph.inputs)), tuple(map(_openvino_tensor, graph.outputs))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("an OpenVINO rung is read by openvino: pip install openvino") from error
    return openvino


def _onnx_tensor(node: Any) -> _Tensor:
    shape = tuple(axis if isinstance(axis, int) else -1 for axis in node.shape)
    return _Tensor(node.name, ORT_TYPES[node.type.removeprefix("tensor(").removesuffix(")")], shape)


def _openvino_tensor(node: Any) -> _Tensor:
    shape = tuple(axis.get_length() if axis.is_static else -1 for axis in node.partial_shape)
    kind = OPENVINO_TYPES[node.get_element_type().get_type_name()]
    return _Tensor(node.get_any_name() if node.get_names() else node.get_node().get_friendly_name(), kind, shape)


def _checked(export: _Export, place: Path, to: str) -> tuple[str, ...]:
    """Hold what was copied against the stored rows; what a reader should know of it.

    Raises:
        BundleError: `differs`: it does not answer as the rung did.
    """
    rung, parity = export.rung, export.parity
    if parity is None or rung.recipe.key not in parity.rungs:
        return ("The bundle holds no stored rows, so the copy was not tried.",)
    runner = rung.recipe.backend.with_knobs(batch=0).load(rung.artifact, place, export.bundle.signature)
    try:
        wrong = parity.deviation(rung.recipe.key, runner(list(parity.inputs)))
    finally:
        runner.close()
    if wrong:
        raise BundleError("differs", f"rung {export.number}: {wrong}; run `accelerando verify` on the bundle")
    if to != "ovms" or rung.recipe.backend.name == "openvino":
        return (f"The copy was asked the {len(parity.inputs[0])} rows of `sample.npz`, and answers as the rung did.",)
    elsewhere = (
        "The figures below are of ONNX Runtime, but this server runs the file in OpenVINO: its speed and, for models "
        "of 8 bits, its answers may be others."
    )
    try:
        answers = _in_openvino(place / "model.onnx", export, parity)
    except MissingExtraError:
        return (f"{elsewhere} OpenVINO was not installed where this was written, so nobody has tried.",)
    wrong = parity.deviation(rung.recipe.key, answers)
    return (elsewhere, f"OpenVINO was asked the rows of `sample.npz`: {wrong or 'it answers as the rung did'}.")


def _in_openvino(path: Path, export: _Export, parity: Parity) -> list[Array]:
    names = [port.name for port in export.bundle.signature.inputs]
    compiled = _openvino().Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({tensor.name: parity.inputs[names.index(tensor.name)] for tensor in export.inputs})
    return [found[i] for i in range(len(export.outputs))]


# --- how a server is told ---------------------------------------------------------------------------------------


def _triton_settings(export: _Export) -> _Settings:
    """The parameters of Triton's two backends (their README pages)."""
    knobs = export.knobs
    if export.rung.recipe.backend.name == "onnxruntime":
        given = {"intra_op_thread_count": str(knobs["threads"])} if knobs["threads"] else {}
        given |= {} if knobs["arena"] else {"enable_mem_arena": "0"}
        return _Settings(given, (*_fixed_rows(knobs), *(() if knobs["spinning"] else ("threads that do not spin",))))
    given = {"PERFORMANCE_HINT": knobs["hint"].upper()}
    given |= {"INFERENCE_NUM_THREADS": str(knobs["threads"])} if knobs["threads"] else {}
    given |= {"NUM_STREAMS": str(knobs["streams"])} if knobs["streams"] else {}
    given |= {"HINT_BF16": "YES"} if knobs["precision"] == "bf16" else {}
    exact = {"f16": ("arithmetic in f16",), "f32": ("arithmetic in f32 where the processor has bf16",)}
    return _Settings(given, (*_fixed_rows(knobs), *exact.get(knobs["precision"], ())))


def _ovms_settings(export: _Export) -> _Settings:
    """The properties of OpenVINO's CPU plugin."""
    knobs, own = export.knobs, export.rung.recipe.backend.name == "openvino"
    given = {
        "PERFORMANCE_HINT": knobs["hint"].upper() if own else "LATENCY",
        "INFERENCE_PRECISION_HINT": knobs["precision"] if own else "f32",
    }
    given |= {"INFERENCE_NUM_THREADS": str(knobs["threads"])} if knobs["threads"] else {}
    given |= {"NUM_STREAMS": str(knobs["streams"])} if own and knobs["streams"] else {}
    return _Settings(given, _fixed_rows(knobs))


def _fixed_rows(knobs: Mapping[str, Any]) -> tuple[str, ...]:
    return (f"shapes made fixed for {knobs['batch']} rows",) if knobs["batch"] else ()


def _triton_config(export: _Export, settings: _Settings) -> str:
    """`config.pbtxt`.  OpenVINO's backend takes batches of any size only where the batch is an axis like others."""
    backend = export.rung.recipe.backend.name
    free = all(tensor.shape[:1] == (-1,) for tensor in (*export.inputs, *export.outputs))
    rows = MOST_ROWS if free and backend == "onnxruntime" else 0
    lines = [f"name: {_quoted(export.name)}", f"backend: {_quoted(backend)}", f"max_batch_size: {rows}"]
    for kind, tensors in (("input", export.inputs), ("output", export.outputs)):
        lines += [_triton_tensor(kind, tensor, tensor.shape[1:] if rows else tensor.shape) for tensor in tensors]
    lines.append("instance_group { count: 1 kind: KIND_CPU }")
    level = GRAPH_LEVELS.get(str(export.knobs.get("optimization")))
    if level is not None:
        lines.append(f"optimization {{ graph {{ level: {level} }} }}")
    for key, value in settings.given.items():
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _triton_tensor(kind: str, tensor: _Tensor, dims: Sequence[int]) -> str:
    shape = f"dims: [ {', '.join(map(str, dims))} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
    return f"{kind} {{ name: {_quoted(tensor.name)} data_type: TYPE_{tensor.kind} {shape} }}"


def _quoted(text: str) -> str:
    return json.dumps(text)  # protobuf's text format takes JSON's escapes of these characters


# --- for its reader ---------------------------------------------------------------------------------------------


def _write_sample(export: _Export, parity: Parity, path: Path) -> None:
    """`input_<name>` and `output_<name>`, by the names of the file."""
    names = [port.name for port in export.bundle.signature.inputs]
    arrays = {f"input_{t.name}": parity.inputs[names.index(t.name)] for t in export.inputs if t.name in names}
    answers = parity.rungs[export.rung.recipe.key]
    arrays |= {f"output_{t.name}": x for t, x in zip(export.outputs, answers, strict=True)}
    with path.open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def _readme(export: _Export, to: str, settings: _Settings, remarks: Sequence[str]) -> str:
    rung, signature = export.rung, export.bundle.signature
    found = rung.evidence
    start = {
        "triton": "tritonserver --model-repository=THIS_FOLDER",
        "ovms": "ovms --config_path THIS_FOLDER/config.json --port 9000 --rest_port 8000",
        "onnx": "python -c \"import onnxruntime; onnxruntime.InferenceSession('model.onnx')\"",
    }[to]
    lines = [
        f"# {export.name}", "",
        f"Rung {export.number} of a bundle by accelerando {export.bundle.run['accelerando']}: `{rung.recipe}`.", "",
        f"    {start}", "",
        *_ports("takes", export.inputs, signature.inputs), *_ports("gives", export.outputs, signature.outputs), "",
        *remarks, "", "## Figures", "",
        f"Measured on {export.bundle.machine.cpu}, batch {found.batch}, "
        f"{'certified' if rung.certified else 'not certified'} on {len(found.scores)} samples; 95 % intervals.", "",
        "| what | figure |", "|---|---|",
        f"| times faster than the original | {_figure(found.speedup)} |",
        f"| milliseconds a call, p50 | {_figure(found.latency().map(lambda s: 1000 * s))} |",
        f"| {found.metric} | {_figure(found.quality)} |", f"| worse than the original by | {_figure(found.drop)} |", "",
        "## Settings", "",
        *(f"* `{key}`: {value}" for key, value in settings.given.items()),
        *(f"* not carried over, for this server can't be told: {what}" for what in settings.lost),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _ports(verb: str, tensors: Sequence[_Tensor], ports: Sequence[Port]) -> list[str]:
    axes: Callable[[int], str] = lambda axis: "any" if axis < 0 else str(axis)  # noqa: E731
    own = {port.name: port for port in ports}
    lines = []
    for i, tensor in enumerate(tensors):
        port = own.get(tensor.name) or (ports[i] if verb == "gives" else None)
        called = f", in the bundle `{port}`" if port else ""
        lines.append(f"* {verb} `{tensor.name}`: {tensor.kind} ({', '.join(map(axes, tensor.shape))}){called}")
    return lines


def _figure(interval: Interval) -> str:
    return f"{interval.mid:.4g} ({interval.low:.4g} to {interval.high:.4g})"
