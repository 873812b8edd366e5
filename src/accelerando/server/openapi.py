"""The OpenAPI 3.1 document of everything that the server answers, and the page that shows it.

The document is as strict as the server: what it allows but the server refuses depends on the model that is asked.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from accelerando.errors import ClosedError, UnknownModelError
from accelerando.server.access import SAFE, Settings, is_open
from accelerando.server.descriptions import own_version
from accelerando.server.repository import Repository
from accelerando.server.schemas import BOOL, TEXT, Json, all_schemas, brought, failure, record, ref, told
from accelerando.server.tensors import RAW_ONLY, datatype_of, wire_shape
from accelerando.signature import Signature

MOST_SHOWN = 256  # elements of an example; a longer one helps nobody
ERRORS = {
    400: "The request is not good; `error` says what was given and what must be.",
    401: "A token is needed, or the one that was sent is not valid.",
    403: "Nobody may come in at present, or a page of another site or another host's name asked.",
    404: "There is no such model, version or path.",
    405: "The path has other methods; `Allow` lists them.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is of a type, or in an encoding, that is not taken.",
    500: "The model failed on these rows; those of other requests were answered.",
    501: "The server lacks what this needs.",
    503: "The model is not ready, or too busy to be in time; try again after `Retry-After` seconds.",
    504: "The deadline passed while the request waited; nothing was computed for it.",
}


@cache
def docs_page() -> bytes:
    """The page at `/docs`, which reads the document and shows it."""
    return Path(__file__).with_name("docs.html").read_bytes()


def document(settings: Settings, shelf: Repository, *, pages: bool) -> Json:
    """The document.

    Args:
        shelf: its models are the examples.
        pages: whether the dashboard and the metrics are there.
    """
    paths = {**_server_paths(), **_model_paths(), **_repository_paths(), **_page_paths(pages)}
    for path, methods in paths.items():
        for method, operation in methods.items():
            if isinstance(operation, dict) and "responses" in operation:
                turned_away = _turned_away(settings, method.upper(), path)
                _fill_errors(operation, {400, 404, 405, *turned_away, *operation["responses"]})
    _give_examples(paths, shelf)
    about: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": settings.server_name,
            "version": own_version(),
            "description": "Models that choose, at each moment, the best of their verified variants that is fast "
            "enough, by the Open Inference Protocol version 2.",
        },
        "paths": paths,
        "components": {"schemas": all_schemas(settings), "responses": {"Error": failure("An error.")}},
    }
    if settings.tokens:
        about["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        about["security"] = [{"token": []}]
        for path in filter(is_open, paths):
            paths[path]["get"]["security"] = []
    return about


def _turned_away(settings: Settings, method: str, path: str) -> set[int]:
    """With what `Access` may answer, before anybody looks at the request."""
    guarded = settings.tokens is not None and not (method in SAFE and is_open(path))
    foreign = settings.hosts is not None or method not in SAFE  # another host's name, a page of another site
    return {*((401,) if guarded else ()), *((403,) if guarded or foreign else ())}


def _fill_errors(operation: Json, codes: set[Any]) -> None:
    """Put in the errors that an operation may answer with, all of one shape."""
    given = operation["responses"]
    operation["responses"] = {str(code): given.get(code) or failure(ERRORS[code]) for code in sorted(codes, key=str)}


# --- paths ------------------------------------------------------------------------------------------------------


def _server_paths() -> Json:
    live, ready = record({"live": BOOL}), record({"ready": BOOL, "error": TEXT}, need=["ready"])
    return {
        "/v2": _get("server", "The server's name, version and extensions", ref("Server")),
        "/v2/health/live": _get("health", "Whether the server runs", live),
        "/v2/health/ready": _get("health", "Whether every model is ready", ready, more={503: told("Not yet.", ready)}),
        "/v2/models/stats": _get("models", "Statistics of every model", ref("Statistics")),
    }


def _model_paths() -> Json:
    ready = record({"name": TEXT, "ready": BOOL, "error": TEXT}, need=["name", "ready"])
    kinds: dict[str, Json] = {
        "": _get("models", "A model's versions, inputs and outputs", ref("Model"), more={503: None}),
        "/ready": _get("models", "Whether a model is ready", ready, more={503: told("Not yet.", ready)}),
        "/config": _get("models", "A model's configuration, as Triton shapes it", ref("Config"), more={503: None}),
        "/stats": _get("models", "A model's statistics, as Triton shapes them", ref("Statistics"), more={503: None}),
        "/infer": {"post": _infer()},
    }
    paths: Json = {}
    for stem in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        names = ["model", "version"] if "{version}" in stem else ["model"]
        for suffix, methods in kinds.items():
            paths[stem + suffix] = {"parameters": [_in_path(n) for n in names], **_copied(methods)}
    goal = record({"name": TEXT, "goal": TEXT})
    paths["/v2/models/{model}/goal"] = {
        "parameters": [_in_path("model")],
        **_get("models", "A model's goal", goal, more={503: None}),
        "put": {
            "tags": ["models"],
            "summary": "Change a model's goal, from its next batch on",
            "requestBody": brought(record({"goal": {**TEXT, "examples": ["p99 <= 20ms"]}}), need=True),
            "responses": {200: told("It is in force.", goal), 408: None, 413: None, 415: None, 503: None},
        },
    }
    return paths


def _infer() -> Json:
    header = {"schema": {"type": "integer", "minimum": 0}, "description": "Bytes of the JSON before the raw tensors."}
    blob = {"schema": {"type": "string", "format": "binary"}}
    answer = told("The outputs, and how they came about.", ref("InferResponse"))
    answer["content"]["application/octet-stream"] = blob
    answer["headers"] = {"Inference-Header-Content-Length": header}
    length = {
        "name": "Inference-Header-Content-Length", "in": "header", "required": False, **header,
        "description": "Bytes of the JSON, where raw tensors follow; 0 where the body is only the model's one input.",
    }  # fmt: skip
    return {
        "tags": ["inference"],
        "summary": "Infer",
        "description": "Tensors go as JSON, or as raw bytes after the JSON (little-endian, packed, in the order of the "
        "inputs), each with its `binary_data_size`. Bodies may be compressed (gzip, deflate). Of the parameters, "
        "`timeout` is in microseconds until the deadline, `priority` 1 goes first, `min_quality` is the least "
        "certified quality that will do. FP16, BF16 and what is not finite go as raw bytes only.",
        "parameters": [length],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": ref("InferRequest")}, "application/octet-stream": blob},
        },
        "responses": {200: answer, **dict.fromkeys((408, 413, 415, 500, 503, 504))},
    }


def _repository_paths() -> Json:
    line = record(
        {"name": TEXT, "version": TEXT, "state": {"enum": ["READY", "LOADING", "UNAVAILABLE"]}, "reason": TEXT}
    )
    faults: dict[int, Any] = dict.fromkeys((408, 413, 415))
    ready = record({"ready": {**BOOL, "description": "Only those that are."}}, need=[])
    parameters = {"type": ["object", "null"], "description": "Particulars, which depend on the server."}
    load = brought(record({"parameters": parameters}, need=[]))
    stem = "/v2/repository/models/{model}"
    return {
        "/v2/repository/index": {
            "post": {
                "tags": ["repository"],
                "summary": "Every model, loaded or not",
                "requestBody": brought(ready),
                "responses": {200: told("The models.", {"type": "array", "items": line}), **faults},
            }
        },
        **{
            f"{stem}/{verb}": {
                "parameters": [_in_path("model")],
                "post": {
                    "tags": ["repository"],
                    "summary": summary,
                    "requestBody": load,
                    "responses": {200: told("It is done.", {"type": "object"}), **faults, 501: None, 503: None},
                },
            }
            for verb, summary in (
                ("load", "Load a model, or load it anew: the old one answers until the new one is warm"),
                ("unload", "Unload a model, once what it has accepted is answered"),
            )
        },
    }


def _page_paths(pages: bool) -> Json:
    def page(summary: str, kind: str) -> Json:
        content = {kind: {"schema": TEXT}} if kind != "application/json" else {kind: {"schema": {"type": "object"}}}
        return {
            "get": {
                "tags": ["pages"],
                "summary": summary,
                "responses": {200: {"description": "It.", "content": content}},
            }
        }

    more = {
        "/": page("The dashboard", "text/html"),
        "/metrics": page("Metrics for Prometheus", "text/plain"),
        "/v2/dashboard/state": page("What the dashboard shows", "application/json"),
        "/v2/dashboard/stream": page("What the dashboard shows, as it changes", "text/event-stream"),
    }
    return {
        **(more if pages else {}),
        "/docs": page("This document, to be read", "text/html"),
        "/openapi.json": page("This document", "application/json"),
    }


def _in_path(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _get(tag: str, summary: str, schema: Json, more: Json | dict[int, Any] | None = None) -> Json:
    return {"get": {"tags": [tag], "summary": summary, "responses": {200: told("It.", schema), **(more or {})}}}


def _copied(methods: Json) -> Json:
    """Operations of their own, for the errors are put into each."""
    return {method: {**operation, "responses": dict(operation["responses"])} for method, operation in methods.items()}


# --- examples ---------------------------------------------------------------------------------------------------


def _give_examples(paths: Json, shelf: Repository) -> None:
    """The names of the models that are there, and a request that the first of them takes."""
    names = list(dict.fromkeys(entry.name for entry in shelf.index()))
    for methods in paths.values():
        for parameter in methods.get("parameters", ()):
            if parameter["name"] == "model" and names:
                parameter["example"] = names[0]
            elif parameter["name"] == "version" and names:
                parameter["example"] = shelf.versions(names[0])[-1]
    try:
        example = example_request(shelf.find(names[0]).signature) if names else None
    except (ClosedError, UnknownModelError):
        return
    for path, methods in paths.items():
        if path.endswith("/infer") and example:
            methods["post"]["requestBody"]["content"]["application/json"]["example"] = example


def example_request(signature: Signature) -> Json | None:
    """A request of one row of zeros; None where it would be too long to look at, or can't be JSON."""
    inputs = []
    for port in signature.inputs:
        datatype, shape = datatype_of(port.dtype), [axis if axis > 0 else 1 for axis in wire_shape(port)]
        if datatype in RAW_ONLY or math.prod(shape) > MOST_SHOWN:
            return None
        zero = {"BOOL": False, "BYTES": ""}.get(datatype, 0)
        inputs.append({"name": port.name, "datatype": datatype, "shape": shape, "data": [zero] * math.prod(shape)})
    return {"inputs": inputs}
