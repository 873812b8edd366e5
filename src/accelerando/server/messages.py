"""Between the protocol's messages of gRPC and arrays and answers.  Nothing here knows connections.

An answer's tensors go out raw where the request's came in raw, and typed where they came in typed (or raw always, for
clients that are used to Triton); the request's parameter `binary_data_output` overrules that.  FP16 has no typed form
and goes out raw always, and then so does every other tensor beside it: the protocol forbids to mix the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from accelerando.errors import DataError
from accelerando.serve.tickets import Answer
from accelerando.server import tensors
from accelerando.server.access import Settings
from accelerando.server.inference import IGNORED, Wishes, explain, read_wishes
from accelerando.server.protocol import inference
from accelerando.signature import Array, Signature

CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
CHOICES = {int: "int64_param", str: "string_param", float: "double_param"}
FINAL = "triton_enable_empty_final_response"  # a client of a stream asks to be told which answer is a request's last
ASIDE = ("binary_data_output", FINAL, *IGNORED)  # parameters that don't bear on when and how well
M = inference().messages


# --- in ---------------------------------------------------------------------------------------------------------


def wishes(request: Any, remaining: float | None) -> Wishes:
    """What a request asks for beside its tensors: the arguments of `Served.submit_soon`.

    Args:
        remaining: seconds until the client gives up; None where it waits for ever.

    Raises:
        DataError: a parameter that is not offered, of another type, or out of range.
    """
    if not request.parameters:
        return Wishes(remaining)
    given = plain(request.parameters)
    found = read_wishes({name: value for name, value in given.items() if name not in ASIDE})
    waits = [seconds for seconds in (found.seconds, remaining) if seconds is not None]
    return replace(found, seconds=min(waits, default=None))


def leaves(request: Any, signature: Signature, settings: Settings) -> list[Array]:
    """The arrays of a request in the signature's order, raw ones as views on the message's bytes.

    Raises:
        DataError: they are not what the model takes, or too many; raw and typed contents are mixed, or do not match in
            number.
    """
    _few(request.inputs, "inputs", settings)
    raw, inputs = request.raw_input_contents, list(request.inputs)
    if raw and (mixed := [tensor.name for tensor in inputs if tensor.HasField("contents")]):
        words = "contents field must not be specified when using raw_input_contents"  # Triton's, for which clients look
        raise DataError(f"{words} for {mixed[0]!r} for model {request.model_name!r}")
    if raw and len(raw) != len(inputs):
        raise DataError(
            f"{len(raw)} raw_input_contents were given for {len(inputs)} inputs; give one for each, in order"
        )
    given: dict[str, tuple[str, Array]] = {}
    for i, tensor in enumerate(inputs):
        name, datatype, shape = tensor.name, tensor.datatype, [*tensor.shape]
        if name in given:
            raise DataError(f"the input {name!r} was given twice")
        _honoured(tensor, "input")
        if raw:
            array = tensors.from_raw(name, datatype, shape, raw[i])
        else:
            array = tensors.from_values(name, datatype, shape, _typed(tensor))
        given[name] = (datatype, array)
    bound = tensors.bind(given, signature)
    if len(bound[0]) > settings.max_rows:
        raise DataError(f"a request may hold {settings.max_rows} rows, but this holds {len(bound[0])}; split it")
    return bound


def _few(found: Any, what: str, settings: Settings) -> None:
    if len(found) > settings.max_tensors:
        raise DataError(f"a request may name {settings.max_tensors} {what}, but this names {len(found)}")


def _typed(tensor: Any) -> Iterable[Any]:
    """The typed contents of a tensor, which are in the one field of its datatype."""
    fields = [field.name for field, _ in tensor.contents.ListFields()]
    want = CONTENTS.get(tensor.datatype, "")
    if wrong := [name for name in fields if name != want]:
        where = want or "raw_input_contents"
        raise DataError(f"the input {tensor.name!r} is {tensor.datatype!r}, but has {wrong[0]}; fill {where}")
    return getattr(tensor.contents, want) if want else ()


def chosen(request: Any, signature: Signature, settings: Settings) -> list[int]:
    """The numbers of the outputs that are asked for, in the request's order; all, where it names none.

    Raises:
        DataError: an output that the model does not have, one that is named twice, or asked for in a form that is
            not served.
    """
    if not request.outputs:
        return list(range(len(signature.outputs)))
    _few(request.outputs, "outputs", settings)
    names = [port.name for port in signature.outputs]
    found: list[int] = []
    for output in request.outputs:
        if output.name not in names:
            raise DataError(f"the output {output.name!r} was asked for, but the model gives {', '.join(names)}")
        if names.index(output.name) in found:
            raise DataError(f"the output {output.name!r} was asked for twice")
        _honoured(output, "output")
        found.append(names.index(output.name))
    return found


def _honoured(tensor: Any, kind: str) -> None:
    """A tensor's parameters, of which none is offered: no shared memory, no classification."""
    if tensor.parameters and (strange := set(tensor.parameters).difference(IGNORED)):
        name = f"{min(strange)[:60]!r} of the {kind} {tensor.name!r}"
        raise DataError(f"the parameter {name} is not offered over gRPC; leave it out")


def wants_raw(request: Any, usual: bool) -> bool:
    """Whether the answer's tensors are to be raw.

    Args:
        usual: what is done where the request does not say.

    Raises:
        DataError: `binary_data_output` is not true or false.
    """
    if "binary_data_output" not in request.parameters:
        return usual
    asked = _value("binary_data_output", request.parameters["binary_data_output"])
    if not isinstance(asked, bool):
        raise DataError(f"the parameter 'binary_data_output' was {asked!r}; it must be a bool_param")
    return asked


def plain(parameters: Any) -> dict[str, object]:
    """Parameters as plain values, by name.

    Raises:
        DataError: one has no value.
    """
    return {name: _value(name, parameter) for name, parameter in parameters.items()}


def _value(name: str, parameter: Any) -> Any:
    which = parameter.WhichOneof("parameter_choice")
    if which is None:
        raise DataError(f"the parameter {name!r} has no value")
    return getattr(parameter, which)


# --- out --------------------------------------------------------------------------------------------------------


def reply(request: Any, signature: Signature, answer: Answer, numbers: Sequence[int], raw: bool) -> Any:
    """The message of an answer, with the outputs of these numbers."""
    message = M.ModelInferResponse(model_name=request.model_name, model_version=str(answer.why.version), id=request.id)
    parameters = message.parameters
    for key, value in explain(answer.why).items():
        setattr(parameters[key], CHOICES[type(value)], value)
    datatypes = [tensors.datatype_of(answer.leaves[i].dtype) for i in numbers]
    raw = raw or not CONTENTS.keys() >= set(datatypes)
    for i, datatype in zip(numbers, datatypes, strict=True):
        leaf = answer.leaves[i]
        output = message.outputs.add(name=signature.outputs[i].name, datatype=datatype, shape=leaf.shape)
        if raw:
            message.raw_output_contents.append(tensors.to_raw(leaf, datatype))
        else:
            values = leaf.ravel().tolist()
            if datatype == "BYTES":
                values = [text if isinstance(text, bytes) else str(text).encode() for text in values]
            getattr(output.contents, CONTENTS[datatype]).extend(values)
    return message
