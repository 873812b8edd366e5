"""A request to infer, and its answer, as the protocol writes them: JSON, with raw tensors after it where that is asked.

A parameter is either honoured or refused, never passed over in silence: a deadline that is misspelt is no deadline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from accelerando.errors import DataError
from accelerando.serve.tickets import Answer, Explanation
from accelerando.server.access import Settings
from accelerando.server.tensors import (
    NUMBERS,
    RAW_ONLY,
    bind,
    datatype_of,
    describe,
    from_raw,
    from_values,
    to_buffer,
    to_values,
)
from accelerando.server.wire_json import brief, finite_text_of, read_json
from accelerando.signature import Array, Port, Signature

PARAMETERS = ("timeout", "priority", "min_quality", "binary_data_output")
IGNORED = ("content_type",)  # MLServer's clients send it with everything; it says nothing that is not said otherwise
REQUEST = ("id", "inputs", "outputs", "parameters")
INPUT = ("name", "shape", "datatype", "data", "parameters")
OUTPUT = ("name", "parameters")
MOST_MICROSECONDS = 2**53


@dataclass(frozen=True)
class Wishes:
    """How soon and how well a request wants to be answered; the arguments of `Served.submit_soon`."""

    seconds: float | None = None
    min_quality: float | None = None
    priority: int = 0


NONE = Wishes()


@dataclass(frozen=True)
class Asked:
    """A request that was read and found good.

    Args:
        outputs: that are wanted, in the order in which they are: (number in the signature, whether as raw bytes).
    """

    leaves: list[Array]
    outputs: tuple[tuple[int, bool], ...]
    wishes: Wishes = NONE
    id: str | None = None


# --- in ---------------------------------------------------------------------------------------------------------


def read_request(body: memoryview, header: int | None, signature: Signature, settings: Settings) -> Asked:
    """What a request asks for.

    Args:
        body: JSON, then the raw tensors one after the other.
        header: bytes of the JSON; None where it is all, 0 where the body is nothing but the model's one input.

    Raises:
        DataError: the request is not good; the message says what of it.
    """
    if header == 0:
        every = tuple((i, True) for i in range(len(signature.outputs)))
        return Asked(read_bare(body, signature, settings), every)
    if header is not None and header > len(body):
        raise DataError(f"Inference-Header-Content-Length is {header}, but the body has only {len(body)} bytes")
    request = read_json(bytes(body if header is None else body[:header]), settings.max_json_parts)
    _check_fields(request, REQUEST, "request")
    name = request.get("id")
    if not isinstance(name, (str, type(None))):
        raise DataError(f"id must be a string, but is {brief(name)}")
    parameters = _parameters(request, "request", (*PARAMETERS, *IGNORED))
    wishes = read_wishes({key: parameters[key] for key in PARAMETERS[:3] if key in parameters}) if parameters else NONE
    raw = None if header is None else body[header:]
    inputs = _tensors(request.get("inputs"), "input", INPUT, signature.inputs, settings)
    leaves = _leaves(inputs, raw, signature, settings)
    binary = _flag(parameters, "binary_data_output", False)
    wanted = request.get("outputs")
    outputs = [] if wanted is None else _tensors(wanted, "output", OUTPUT, signature.outputs, settings)
    return Asked(leaves, _outputs(outputs, binary, signature), wishes, name)


def read_wishes(parameters: Mapping[str, Any]) -> Wishes:
    """`timeout` (microseconds), `priority` and `min_quality` of a request's parameters, checked.

    Raises:
        DataError: another parameter, or a value that is none.
    """
    _refuse_unknown(parameters, PARAMETERS, "the request")
    timeout, priority, least = (parameters.get(key) for key in PARAMETERS[:3])
    if timeout is not None and (type(timeout) is not int or not 0 < timeout <= MOST_MICROSECONDS):
        raise DataError(
            f"timeout is {brief(timeout)}, but must be a whole number of microseconds above 0: the deadline has "
            f"passed otherwise; leave it out to have the model's own"
        )
    if priority is not None and (type(priority) is not int or not 0 <= priority < 2**32):
        raise DataError(f"priority is {brief(priority)}, but must be a whole number: 1 goes first, 0 is the usual")
    if least is not None and (type(least) not in (int, float) or not math.isfinite(_float(least))):
        raise DataError(f"min_quality is {brief(least)}, but must be a number in the unit of the model's metric")
    seconds = None if timeout is None else timeout / 1e6
    return Wishes(seconds, None if least is None else float(least), priority or 0)


def read_bare(body: memoryview, signature: Signature, settings: Settings) -> list[Array]:
    """The one input of a model, whose raw bytes are the whole body; its rows, or its other free axis, are counted."""
    if len(signature.inputs) != 1:
        takes = "; ".join(map(describe, signature.inputs))
        raise DataError(f"a body without JSON can only be the input of a model that has one, but this takes {takes}")
    port = signature.inputs[0]
    datatype = datatype_of(port.dtype)
    free = [i for i, axis in enumerate(port.shape) if isinstance(axis, str)]
    shape = [axis if isinstance(axis, int) else 1 for axis in port.shape]
    if datatype == "BYTES":  # by the extension, the body is then one element without its length
        body = memoryview(len(body).to_bytes(4, "little") + bytes(body))
    elif free:
        one = NUMBERS[datatype].itemsize * math.prod(shape)
        shape[free[-1]] = len(body) // one if one else 0
        if len(free) > 2 or (one and len(body) % one):
            words = "its shape can't be told from them" if len(free) > 2 else f"of which {one} or a multiple must be"
            raise DataError(f"the body has {len(body)} bytes for {describe(port)}, {words}; send JSON before it")
    return _bound({port.name: (datatype, from_raw(port.name, datatype, shape, body))}, signature, settings)


def _leaves(inputs: list[Any], raw: memoryview | None, signature: Signature, settings: Settings) -> list[Array]:
    given: dict[str, tuple[str, Array]] = {}
    at = 0
    for tensor in inputs:
        name, datatype, shape = tensor["name"], tensor.get("datatype"), tensor.get("shape")
        if not isinstance(datatype, str):
            raise DataError(f"input {name!r} needs a datatype such as FP32, but has {brief(datatype)}")
        if not isinstance(shape, list) or len(shape) > settings.max_nesting:
            most = f"a shape, a list of at most {settings.max_nesting} whole numbers"
            raise DataError(f"input {name!r} needs {most}, but has {brief(shape)}")
        size = _size(tensor, raw is not None)
        if size is None:
            if not isinstance(tensor.get("data"), list):
                kind = brief(tensor.get("data"))
                raise DataError(f"input {name!r} needs a list as data, or binary_data_size, but has {kind}")
            given[name] = datatype, from_values(name, datatype, shape, tensor["data"])
            continue
        assert raw is not None
        if at + size > len(raw):
            raise DataError(f"input {name!r} takes {size} bytes of binary data, but only {len(raw) - at} are left")
        given[name] = datatype, from_raw(name, datatype, shape, raw[at : at + size])
        at += size
    if raw is not None and at != len(raw):
        raise DataError(f"the inputs take {at} bytes of binary data, but {len(raw)} came after the JSON")
    return _bound(given, signature, settings)


def _size(tensor: Mapping[str, Any], binary: bool) -> int | None:
    """The bytes of an input's binary data; None where its data is in the JSON."""
    size = _parameters(tensor, "input", ("binary_data_size", *IGNORED)).get("binary_data_size")
    if size is None:
        return None
    where = _called("input", tensor)
    if type(size) is not int or size < 0:
        raise DataError(f"binary_data_size of {where} must be a whole number, but is {brief(size)}")
    if tensor.get("data") is not None:
        raise DataError(f"{where} has data in the JSON and binary_data_size too; give one of them")
    if not binary:
        raise DataError(f"{where} has binary data, which needs the header Inference-Header-Content-Length")
    return size


def _bound(given: Mapping[str, tuple[str, Array]], signature: Signature, settings: Settings) -> list[Array]:
    leaves = bind(given, signature)
    if len(leaves[0]) > settings.max_rows:
        raise DataError(f"a request may hold {settings.max_rows} rows, but this holds {len(leaves[0])}; split it")
    return leaves


def _outputs(wanted: list[Any], binary: bool, signature: Signature) -> tuple[tuple[int, bool], ...]:
    """Which outputs are wanted, and how; all, where none is named."""
    names = [port.name for port in signature.outputs]
    chosen = [] if wanted else [(number, binary) for number in range(len(names))]
    for tensor in wanted:
        parameters = _parameters(tensor, "output", ("binary_data", *IGNORED))
        chosen.append((names.index(tensor["name"]), _flag(parameters, "binary_data", binary)))
    for number, raw in chosen:
        datatype = datatype_of(signature.outputs[number].dtype)
        if datatype in RAW_ONLY and not raw:
            raise DataError(
                f"output {names[number]!r} is {datatype}, which JSON can't hold; ask for it with the parameter "
                f"binary_data: true"
            )
    return tuple(chosen)


def _tensors(
    tensors: Any, kind: str, fields: tuple[str, ...], ports: tuple[Port, ...], settings: Settings
) -> list[dict[str, Any]]:
    """The inputs or outputs that a request names: each an object, named once, and of the model."""
    if not isinstance(tensors, list) or len(tensors) > settings.max_tensors:
        raise DataError(f"{kind}s must be a list of at most {settings.max_tensors} tensors, but is {brief(tensors)}")
    names = {port.name for port in ports}
    for tensor in tensors:
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(name, str):
            raise DataError(f"each of {kind}s must be an object with a name, but one is {brief(tensor)}")
        if name not in names:
            again = any(port.name == name for port in ports)
            what = "is there twice" if again else "is none of the model's"
            there = "; ".join(map(describe, ports))
            raise DataError(f"{kind} {brief(name)} {what}; the model has {there}")
        names.discard(name)
        _check_fields(tensor, fields, kind)
    return tensors


def _parameters(holder: Mapping[str, Any], kind: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The parameters of a request, an input or an output."""
    found = holder.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise DataError(f"parameters of {_called(kind, holder)} must be an object, but are {brief(found)}")
    _refuse_unknown(found, known, _called(kind, holder))
    return found


def _refuse_unknown(found: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := [brief(key) for key in found if key not in known]:
        taken = ", ".join(name for name in known if name not in IGNORED)
        named = ", ".join(sorted(unknown)[:5])
        raise DataError(f"no parameter {named} of {where} is offered here, but {taken}")


def _check_fields(found: Mapping[str, Any], fields: tuple[str, ...], kind: str) -> None:
    for key in found:
        if key not in fields:
            raise DataError(f"{_called(kind, found)} has a field {brief(key)}, but may have {', '.join(fields)}")


def _called(kind: str, found: Mapping[str, Any]) -> str:
    """What a request, an input or an output is called in messages."""
    return "the request" if kind == "request" else f"{kind} {found['name']!r}"


def _flag(parameters: Mapping[str, Any], key: str, otherwise: bool) -> bool:
    value = parameters.get(key, otherwise)
    if not isinstance(value, bool):
        raise DataError(f"{key} must be true or false, but is {brief(value)}")
    return value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond float64
        return math.inf


# --- out --------------------------------------------------------------------------------------------------------


def explain(why: Explanation) -> dict[str, Any]:
    """How an answer came about, as parameters of a response; `quality` is certified, with its bounds."""
    quality = {"quality": why.quality.mid, "quality_low": why.quality.low, "quality_high": why.quality.high}
    return {
        "rung": why.rung,
        "recipe": why.recipe,
        **{key: value for key, value in quality.items() if math.isfinite(value)},
        "queue_us": round(why.queued * 1e6),
        "compute_us": round(why.computed * 1e6),
        "batch_rows": why.rows,
    }


def write_answer(name: str, signature: Signature, asked: Asked, answer: Answer) -> tuple[bytes, list[Array | bytes]]:
    """The JSON of an answer, and the raw tensors that follow it.

    Raises:
        DataError: an output holds what JSON can't say: NaN, infinity, or bytes that are not text.
    """
    response: dict[str, Any] = {"model_name": name, "model_version": str(answer.why.version)}
    if asked.id is not None:
        response["id"] = asked.id
    response["parameters"] = explain(answer.why)
    outputs, pieces = [], []
    for number, raw in asked.outputs:
        leaf = answer.leaves[number]
        output = signature.outputs[number].name
        tensor: dict[str, Any] = {"name": output, "datatype": datatype_of(leaf.dtype), "shape": [*leaf.shape]}
        if raw:
            piece = to_buffer(leaf)
            pieces.append(piece)
            tensor["parameters"] = {"binary_data_size": len(piece) if isinstance(piece, bytes) else piece.nbytes}
        else:
            tensor["data"] = _values(output, leaf, asked)
        outputs.append(tensor)
    response["outputs"] = outputs
    return finite_text_of(response), pieces


def _values(name: str, leaf: Array, asked: Asked) -> list[Any]:
    if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
        words = f"output {name!r} holds NaN or infinity, which JSON can't hold; ask for it with binary_data: true"
        finite = all(np.isfinite(given).all() for given in asked.leaves if given.dtype.kind == "f")
        raise DataError(words if finite else f"{words}, or send inputs that are finite: these are not")
    try:
        return to_values(leaf)
    except DataError as error:
        raise DataError(f"output {name!r}: {error}") from error
