"""The calls of the Open Inference Protocol over gRPC, each from its message to its answer."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from accelerando.errors import AccelerandoError, ClosedError, DataError, UnknownModelError
from accelerando.serve.tickets import Answer
from accelerando.server import descriptions, messages
from accelerando.server.access import Settings
from accelerando.server.protocol import inference
from accelerando.server.repository import Repository
from accelerando.server.tracing import OFF, Tracing
from accelerando.server.waiting import woken_by

M = inference().messages
LARGE = 256 * 2**10  # bytes of a message from which on it is read and written beside the event loop


class Calls:
    """What a server answers.  A method bears the name of its call, and takes its message and the call's context.

    Args:
        shelf: its models.
        tracing: of the requests for inference.
        always_raw: answer with raw tensors also where the request's came in typed.
    """

    def __init__(self, shelf: Repository, settings: Settings, tracing: Tracing, always_raw: bool) -> None:
        self.shelf, self.settings, self.tracing, self.always_raw = shelf, settings, tracing, always_raw
        self.stopping = asyncio.Event()  # set once, when no more is taken on

    def is_ready(self, name: str = "", version: str = "") -> bool:
        """Whether a model is ready, or without a name the server.  A model that nobody knows is not."""
        if self.stopping.is_set() or not name:
            return not self.stopping.is_set() and self.shelf.ready
        try:
            return self.shelf.find(name, version or None).ready
        except (ClosedError, UnknownModelError):
            return False

    # --- health and metadata

    async def server_live(self, request: Any, context: Any) -> Any:
        return M.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, context: Any) -> Any:
        return M.ServerReadyResponse(ready=self.is_ready())

    async def model_ready(self, request: Any, context: Any) -> Any:
        return M.ModelReadyResponse(ready=bool(request.name) and self.is_ready(request.name, request.version))

    async def server_metadata(self, request: Any, context: Any) -> Any:
        return M.ServerMetadataResponse(**descriptions.server_metadata(self.settings.server_name))

    async def model_metadata(self, request: Any, context: Any) -> Any:
        served = self.shelf.find(request.name, request.version or None)
        versions = self.shelf.versions(request.name)
        return M.ModelMetadataResponse(**descriptions.model_metadata(request.name, versions, served.signature))

    async def model_config(self, request: Any, context: Any) -> Any:
        served = self.shelf.find(request.name, request.version or None)
        config = descriptions.model_config(request.name, served.signature, self.settings.max_rows)
        return M.ModelConfigResponse(config=config)

    async def model_statistics(self, request: Any, context: Any) -> Any:
        """Of one model, or without a name of all that are ready."""
        if request.name:
            return M.ModelStatisticsResponse(model_stats=[self._statistics(request.name, request.version)])
        found = []
        for entry in self.shelf.index():
            with suppress(ClosedError, UnknownModelError):  # not loaded, or not any longer
                found.append(self._statistics(entry.name, entry.version))
        return M.ModelStatisticsResponse(model_stats=found)

    def _statistics(self, name: str, version: str) -> dict[str, Any]:
        status = self.shelf.find(name, version or None).status()
        return descriptions.model_statistics(name, version or str(status.version), status)

    # --- the repository

    async def repository_index(self, request: Any, context: Any) -> Any:
        _no_repository_name(request)
        entries = [entry for entry in self.shelf.index() if entry.state == "READY" or not request.ready]
        return M.RepositoryIndexResponse(models=map(descriptions.index_entry, entries))

    async def repository_model_load(self, request: Any, context: Any) -> Any:
        _no_repository_name(request)
        name, parameters = request.model_name, messages.plain(request.parameters)
        try:
            await asyncio.to_thread(self.shelf.load, name, parameters)
        except AccelerandoError as error:
            error.args = (f"failed to load {name!r}: {error}",)  # the words by which clients know it
            raise
        return M.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any, context: Any) -> Any:
        """`unload_dependents`, which clients always send, changes nothing: no model here depends on another."""
        _no_repository_name(request)
        if strange := set(request.parameters) - {"unload_dependents"}:
            raise DataError(f"the parameter {min(strange)!r} was given, but unloading takes none")
        await asyncio.to_thread(self.shelf.unload, request.model_name)
        return M.RepositoryModelUnloadResponse()

    # --- inference

    async def model_infer(self, request: Any, context: Any) -> Any:
        """The answer; what a caller that gives up has in the queue is cancelled."""
        told = () if self.tracing is OFF else context.invocation_metadata() or ()  # reading it takes a while
        with self.tracing.request(request.model_name, "grpc", told) as trace:
            served = self.shelf.find(request.model_name, request.model_version or None)
            signature, settings = served.signature, self.settings
            asked = messages.wishes(request, context.time_remaining())
            raw = messages.wants_raw(request, usual=self.always_raw or bool(request.raw_input_contents))
            numbers = messages.chosen(request, signature, settings)
            if request.ByteSize() < LARGE:
                leaves = messages.leaves(request, signature, settings)
            else:
                leaves = await asyncio.to_thread(messages.leaves, request, signature, settings)
            ticket = served.submit_soon(
                leaves, asyncio.get_running_loop().call_soon,
                seconds=asked.seconds, min_quality=asked.min_quality, priority=asked.priority,
            )  # fmt: skip
            answer = await _result(ticket.future)
            trace.answered(answer.why, ticket.rows, late=time.monotonic() > ticket.deadline)
            if sum([leaf.nbytes for leaf in answer.leaves]) < LARGE:
                return messages.reply(request, signature, answer, numbers, raw)
            return await asyncio.to_thread(messages.reply, request, signature, answer, numbers, raw)

    async def model_stream_infer(self, request: Any, context: Any) -> Any:
        """The answer to one request of a stream, where a last answer is marked as such if the client asks."""
        answer = await self.model_infer(request, context)
        if messages.FINAL in request.parameters:
            answer.parameters["triton_final_response"].bool_param = True
        return M.ModelStreamInferResponse(infer_response=answer)


async def _result(future: Future[Answer]) -> Answer:
    """What the runtime answers.  Where the caller gives up, this task is cancelled, and so are then the rows that wait.

    Raises:
        ServingError: the runtime did not answer.
    """
    if not future.done():
        try:
            await woken_by(future)
        finally:
            future.cancel()  # does nothing to one that is done
    try:
        return future.result()
    except CancelledError as error:
        raise ClosedError("the server is closing, and dropped the request") from error


def _no_repository_name(request: Any) -> None:
    if request.repository_name:
        raise DataError(f"the repository {request.repository_name!r} was asked for; there is one only: leave it out")
