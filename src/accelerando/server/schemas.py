"""The schemas of what goes over HTTP, for the OpenAPI document; as strict as the server."""

from __future__ import annotations

from typing import Any

from accelerando.server.access import Settings
from accelerando.server.inference import MOST_MICROSECONDS
from accelerando.server.tensors import DATATYPES, MOST_AXES, MOST_ELEMENTS

Json = dict[str, Any]
TEXT: Json = {"type": "string"}
BOOL: Json = {"type": "boolean"}
WHOLE: Json = {"type": "integer", "minimum": 0}
HINT: Json = {"content_type": {"description": "Ignored: it says nothing new."}}


def all_schemas(settings: Settings) -> Json:
    shape = {
        "type": "array",
        "items": {**WHOLE, "maximum": MOST_ELEMENTS},
        "maxItems": min(settings.max_nesting, MOST_AXES),
    }
    scalar = {"type": ["number", "string", "boolean"]}
    data = {"type": "array", "description": "In row-major order, flat or nested as the shape says."}
    size = record({"binary_data_size": {"type": ["integer", "null"], "minimum": 0}, **HINT}, need=[], null=True)
    raw = record({"binary_data": BOOL, **HINT}, need=[], null=True)
    tensor = {"name": TEXT, "datatype": {"enum": [*DATATYPES]}, "shape": shape}
    answer = {**tensor, "data": data, "parameters": {"type": "object"}}
    port = record(
        {"name": TEXT, "datatype": {"enum": [*DATATYPES]}, "shape": {"type": "array", "items": {"type": "integer"}}}
    )
    span = record({"count": WHOLE, "ns": WHOLE})
    stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
    inputs = record({**tensor, "data": {**data, "type": ["array", "null"]}, "parameters": size}, need=[*tensor])
    outputs = record({"name": TEXT, "parameters": raw}, need=["name"])
    most = {"maxItems": settings.max_tensors}
    return {
        "Error": record({"error": TEXT}),
        "Server": record({"name": TEXT, "version": TEXT, "extensions": {"type": "array", "items": TEXT}}),
        "Model": record(
            {
                "name": TEXT,
                "versions": {"type": "array", "items": TEXT},
                "platform": TEXT,
                "inputs": {"type": "array", "items": port},
                "outputs": {"type": "array", "items": port},
            }
        ),
        "Config": {"type": "object", "required": ["name", "max_batch_size", "input", "output"]},
        "Statistics": record(
            {
                "model_stats": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["name", "version", "inference_count", "execution_count", "inference_stats"],
                        "properties": {"inference_stats": record(dict.fromkeys(stages, span))},
                    },
                }
            }
        ),
        "InferRequest": record(
            {
                "id": {"type": ["string", "null"]},
                "parameters": record(_wishes(), need=[], null=True),
                "inputs": {"type": "array", "items": inputs, **most},
                "outputs": {"type": ["array", "null"], "items": outputs, **most, "description": "All, where left out."},
            },
            need=["inputs"],
        ),
        "InferResponse": record(
            {
                "model_name": TEXT,
                "model_version": TEXT,
                "id": TEXT,
                "parameters": {"type": "object", "additionalProperties": scalar},
                "outputs": {"type": "array", "items": record(answer, need=[*tensor])},
            },
            need=["model_name", "model_version", "outputs"],
        ),
    }


def _wishes() -> Json:
    return {
        "timeout": {"type": ["integer", "null"], "minimum": 1, "maximum": MOST_MICROSECONDS},
        "priority": {"type": ["integer", "null"], "minimum": 0, "maximum": 2**32 - 1},
        "min_quality": {"type": ["number", "null"]},
        "binary_data_output": BOOL,
        **HINT,
    }


def record(fields: Json, *, need: list[str] | None = None, null: bool = False) -> Json:
    """An object of these fields and no others, all of them there unless `need` lists those that must be."""
    return {
        "type": ["object", "null"] if null else "object",
        "properties": fields,
        "required": [*fields] if need is None else need,
        "additionalProperties": False,
    }


def ref(name: str) -> Json:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def told(words: str, schema: Json) -> Json:
    """An answer in JSON."""
    return {"description": words, "content": {"application/json": {"schema": schema}}}


def failure(words: str) -> Json:
    """An answer that is an error."""
    return told(words, ref("Error"))


def brought(schema: Json, *, need: bool = False) -> Json:
    """The body of a request."""
    return {"required": need, "content": {"application/json": {"schema": schema}}}
