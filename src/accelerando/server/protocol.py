"""The gRPC messages and methods of the protocols that are served, read from the `.proto` files beside this one.

They live in a descriptor pool of their own: other packages (kserve, tritonclient) register the same names under other
files in protobuf's default pool, and where two of them meet in one process, the second import fails.  Reading the
text here, at the start, needs no generated code, which would be bound to one version of protobuf.

Source of the grammar: the Protocol Buffers language, proto3; only what the two files hold of it is known here, and
anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

COMMENT = re.compile(r"//.*")
END = ""
TOKEN = re.compile(r'"[^"]*"|[\w.]+|\S')
Field = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    "bool": Field.TYPE_BOOL, "bytes": Field.TYPE_BYTES, "double": Field.TYPE_DOUBLE, "float": Field.TYPE_FLOAT,
    "int32": Field.TYPE_INT32, "int64": Field.TYPE_INT64, "string": Field.TYPE_STRING, "uint32": Field.TYPE_UINT32,
    "uint64": Field.TYPE_UINT64,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One call of a service: the classes of what goes in and comes out, and which of them is a stream."""

    name: str
    request: Any
    response: Any
    takes_stream: bool
    gives_stream: bool


@dataclass(frozen=True)
class Protocol:
    """One `.proto` file.

    Args:
        service: its full name, as in the path of a call.
        methods: by name.
        messages: the classes of its outermost messages, and the numbers of its enumerations, as attributes.
        file: its description, every name resolved.
    """

    service: str
    methods: dict[str, Method]
    messages: Any
    file: Any


@cache
def inference() -> Protocol:
    """The Open Inference Protocol, version 2, and Triton's extensions of it."""
    return _start("inference.proto")


@cache
def health() -> Protocol:
    """The health protocol of gRPC."""
    return _start("health.proto")


def _start(name: str) -> Protocol:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    pool, file = DescriptorPool(), descriptor_pb2.FileDescriptorProto()
    pool.AddSerializedFile(parse(name, text).SerializeToString())
    found = pool.FindFileByName(name)
    found.CopyToProto(file)
    described = found.message_types_by_name
    classes = {n: message_factory.GetMessageClass(d) for n, d in described.items()}
    enums = found.enum_types_by_name.items()
    numbers = {n: SimpleNamespace(**{v: d.number for v, d in e.values_by_name.items()}) for n, e in enums}
    (service,) = file.service
    methods = {m.name: _method(m, classes) for m in service.method}
    return Protocol(f"{file.package}.{service.name}", methods, SimpleNamespace(**classes, **numbers), file)


def _method(described: Any, classes: dict[str, Any]) -> Method:
    request, response = (classes[kind.rpartition(".")[2]] for kind in (described.input_type, described.output_type))
    return Method(described.name, request, response, described.client_streaming, described.server_streaming)


# --- the language -----------------------------------------------------------------------------------------------


def parse(name: str, text: str) -> descriptor_pb2.FileDescriptorProto:
    """The description of a file in the proto3 language.

    Raises:
        ValueError: something that is not known here.
    """
    file = descriptor_pb2.FileDescriptorProto(name=name, syntax="proto3")
    tokens = chain(TOKEN.findall(COMMENT.sub("", text)), repeat(END))
    for word in iter(tokens.__next__, END):
        if word == "syntax":
            _expect(tokens, "=", '"proto3"', ";")
        elif word == "package":
            file.package = next(tokens)
            _expect(tokens, ";")
        elif word == "message":
            _message(tokens, file.message_type.add(name=next(tokens)))
        elif word == "enum":
            _enum(tokens, file.enum_type.add(name=next(tokens)))
        elif word == "service":
            _service(tokens, file.service.add(name=next(tokens)))
        else:
            raise ValueError(f"{word!r} was found in {name} where a message, an enum or a service must be")
    return file


def _message(tokens: Iterator[str], message: Any) -> None:
    _expect(tokens, "{")
    for word in _until_closed(tokens):
        if word == "message":
            _message(tokens, message.nested_type.add(name=next(tokens)))
        elif word == "enum":
            _enum(tokens, message.enum_type.add(name=next(tokens)))
        elif word == "oneof":
            message.oneof_decl.add(name=next(tokens))
            _expect(tokens, "{")
            for kind in _until_closed(tokens):
                _field(tokens, message, kind).oneof_index = len(message.oneof_decl) - 1
        elif word == "map":
            _map(tokens, message)
        elif word == "repeated":
            _field(tokens, message, next(tokens), Field.LABEL_REPEATED)
        else:
            _field(tokens, message, word)


def _field(tokens: Iterator[str], message: Any, kind: str, label: int = Field.LABEL_OPTIONAL) -> Any:
    name, number = _name_and_number(tokens)
    return _add(message, name, number, kind, label)


def _add(message: Any, name: str, number: int, kind: str, label: int = Field.LABEL_OPTIONAL) -> Any:
    """A new field; a type that is no scalar is found by its name, from the inside out, when the pool takes the file."""
    field = message.field.add(name=name, number=number, label=label)
    if kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type_name = kind
    return field


def _map(tokens: Iterator[str], message: Any) -> None:
    """A map is a repeated message of a key and a value, named after the field."""
    _expect(tokens, "<")
    key = next(tokens)
    _expect(tokens, ",")
    value = next(tokens)
    _expect(tokens, ">")
    name, number = _name_and_number(tokens)
    entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    _add(entry, "key", 1, key)
    _add(entry, "value", 2, value)
    _add(message, name, number, entry.name, Field.LABEL_REPEATED)


def _enum(tokens: Iterator[str], enum: Any) -> None:
    _expect(tokens, "{")
    for word in _until_closed(tokens):
        name, number = _name_and_number(tokens, word)
        enum.value.add(name=name, number=number)


def _service(tokens: Iterator[str], service: Any) -> None:
    """`rpc Name(stream Request) returns (Response) {}`, where each `stream` may be missing."""
    _expect(tokens, "{")
    for word in _until_closed(tokens):
        if word != "rpc":
            raise ValueError(f"{word!r} was found where an rpc must be")
        method = service.method.add(name=next(tokens))
        method.client_streaming, method.input_type = _type(tokens)
        _expect(tokens, "returns")
        method.server_streaming, method.output_type = _type(tokens)
        _expect(tokens, "{", "}")


def _type(tokens: Iterator[str]) -> tuple[bool, str]:
    _expect(tokens, "(")
    word = next(tokens)
    streams = word == "stream"
    name = next(tokens) if streams else word
    _expect(tokens, ")")
    return streams, name


def _name_and_number(tokens: Iterator[str], name: str = "") -> tuple[str, int]:
    """`name = number;`, where the name may have been read before."""
    name = name or next(tokens)
    _expect(tokens, "=")
    number = int(next(tokens))
    _expect(tokens, ";")
    return name, number


def _until_closed(tokens: Iterator[str]) -> Iterator[str]:
    for word in iter(tokens.__next__, "}"):
        if word == END:
            raise ValueError("the file ends where a } must be")
        yield word


def _expect(tokens: Iterator[str], *words: str) -> None:
    for want in words:
        if (word := next(tokens)) != want:
            raise ValueError(f"{word or 'the end'!r} was found where {want!r} must be")
