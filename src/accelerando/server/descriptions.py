"""What the protocol tells about the server and its models, as plain data: metadata, configuration, statistics.

Sources: the Open Inference Protocol; Triton's extensions "statistics", "model_configuration", "model_repository" and
"schedule_policy", as tritonclient and perf_analyzer read them.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import Any

from accelerando.serve.status import Status
from accelerando.server.repository import Entry
from accelerando.server.tensors import datatype_of, wire_shape
from accelerando.signature import Port, Signature

PLATFORM = "accelerando"
EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "schedule_policy",
    "statistics",
)


@cache
def own_version() -> str:
    """The version of this package."""
    return version("accelerando")


def server_metadata(name: str) -> dict[str, Any]:
    """The server: its name, version and extensions."""
    return {"name": name, "version": own_version(), "extensions": list(EXTENSIONS)}


def model_metadata(name: str, versions: tuple[str, ...], signature: Signature) -> dict[str, Any]:
    """A model: its versions, inputs and outputs."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": PLATFORM,
        "inputs": [_tensor(port) for port in signature.inputs],
        "outputs": [_tensor(port) for port in signature.outputs],
    }


def model_config(name: str, signature: Signature, max_rows: int) -> dict[str, Any]:
    """A model's configuration as Triton shapes it; with a fixed batch, `max_batch_size` is 0 and `dims` hold it."""
    most = 0 if signature.fixed_batch is not None else max_rows
    return {
        "name": name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": most,
        "input": [{**_dims(port, most), "optional": False} for port in signature.inputs],
        "output": [_dims(port, most) for port in signature.outputs],
        "dynamic_batching": {},
        "model_transaction_policy": {"decoupled": False},
    }


def model_statistics(name: str, number: str, status: Status) -> dict[str, Any]:
    """One model's counters since it was loaded, as Triton shapes them; durations in nanoseconds.

    `fail` counts what was refused and what expired too: for a client these failed.
    """
    answered, computed = status.answered, _nanoseconds(status.computed.total)
    waited = _nanoseconds(status.queued.total)
    lost = status.failed + status.refused + status.expired
    nothing = {"count": answered, "ns": 0}  # inputs and outputs are not copied apart from the computation
    return {
        "name": name,
        "version": number,
        "last_inference": round(status.latest * 1000),
        "inference_count": status.rows,
        "execution_count": status.batches,
        "inference_stats": {
            "success": {"count": answered, "ns": waited + computed},
            "fail": {"count": lost, "ns": 0},
            "queue": {"count": answered, "ns": waited},
            "compute_input": nothing,
            "compute_infer": {"count": answered, "ns": computed},
            "compute_output": nothing,
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": status.memory_bytes}],
    }


def index_entry(entry: Entry) -> dict[str, str]:
    """One line of the repository's index."""
    return {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}


def _tensor(port: Port) -> dict[str, Any]:
    return {"name": port.name, "datatype": datatype_of(port.dtype), "shape": wire_shape(port)}


def _dims(port: Port, most: int) -> dict[str, Any]:
    datatype = datatype_of(port.dtype)
    shape = wire_shape(port)
    return {
        "name": port.name,
        "data_type": "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}",
        "dims": shape[1:] if most else shape,
    }


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
