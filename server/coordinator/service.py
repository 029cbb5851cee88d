"""The service: what a client may ask of the coordinator, each call checked before it costs anything.

Owns the order of the checks (form, who, which task, size, and only then bytes) and what a peer is told. Must never
decide about an update or a client: that is the machine's.
"""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from fedge.core.errors import (
    FedgeError,
    ModelError,
    NotYourTask,
    RefusedClient,
    TaskSpent,
    TooStale,
    UnknownTask,
    WrongHash,
    WrongManifest,
    WrongSize,
)
from fedge.core.task import DELTA
from fedge.protos import fedge_pb2 as pb
from fedge.protos import fedge_pb2_grpc, wire
from fedge.server.coordinator.coordinator import Coordinator
from fedge.server.coordinator.facts import Stored
from fedge.server.coordinator.sessions import Session
from fedge.server.coordinator.spool import Upload
from fedge.server.machine import Machine
from fedge.server.machine.events import Ack, Effect, Evict, Failed, Joined, Refuse

Context = Any  # grpc.aio.ServicerContext; grpcio is not typed
Request = TypeVar("Request")
Reply = TypeVar("Reply")
Handler = Callable[["Service", Request, Context], Awaitable[Reply]]
_log = logging.getLogger("fedge")


def answers(handler: Handler[Request, Reply]) -> Handler[Request, Reply]:
    """A handler whose errors become a status, one sentence and a reason; never a stack trace."""

    @functools.wraps(handler)
    async def answer(service: "Service", request: Request, context: Context) -> Reply:
        try:
            async with asyncio.timeout(service.limits.stream_timeout_s):
                return await handler(service, request, context)
        except FedgeError as error:
            status, detail, metadata = wire.refusal_of(error)
        except TimeoutError:
            status, detail, metadata = "DEADLINE_EXCEEDED", "The call took too long; go on with a new one.", ()
        except (grpc.aio.AbortError, grpc.aio.UsageError, grpc.aio.BaseError):
            raise
        except Exception:  # a fault of ours, written down here; the peer learns no more than that
            _log.exception("%s failed", handler.__name__)
            status, detail, metadata = "INTERNAL", "The coordinator failed on this call; its log says why.", ()
        return await context.abort(grpc.StatusCode[status], detail, metadata)  # type: ignore[no-any-return]

    return answer


class Service(fedge_pb2_grpc.CoordinatorServicer):
    """The eight calls of fedge.proto over one Coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.limits = coordinator.federation.limits
        self._wrong_hashes: dict[str, int] = {}  # by task
        self._turned_away: dict[str, FedgeError] = {}  # by task: who still sends may not hear why, and asks again

    # ---- members -------------------------------------------------------------------------------

    @answers
    async def Join(self, request: pb.JoinRequest, _: Context) -> pb.JoinReply:  # noqa: N802 -- as in fedge.proto
        """Become, or become again, a member. Who names neither a model nor examples only hears the terms."""
        wire.check_join(request, self.limits)
        who, hub = request.sender, self._coordinator
        layout = hub.federation.layout.hash
        terms = pb.JoinReply(
            run_id=hub.run_id,
            layout_hash=layout,
            chunk_bytes=self.limits.chunk_bytes,
            stream_timeout_s=self.limits.stream_timeout_s,
            experiment=hub.experiment_text,
        )
        if not request.layout_hash and not request.examples:
            return terms  # it only wants to know what the run is about
        if request.layout_hash not in ("", layout):
            raise ModelError("The client's model differs from the coordinator's; use the same factory on both sides.")
        session = hub.sessions.find(who.client)
        if session is None and len(hub.sessions) >= self.limits.max_clients:
            raise RefusedClient(f"The federation is full ({self.limits.max_clients} clients); try again later.")
        if session is None or session.incarnation != who.incarnation:
            await hub.remember(who.client, who.incarnation)
            effects = await hub.submit(Joined(0.0, who.client, request.examples, request.layout_hash))
            _raise_refusal(effects, who.client, "")
            hub.sessions.admit(who.client, who.incarnation)
        else:
            session.touch()
        return terms

    @answers
    async def Leave(self, request: pb.LeaveRequest, _: Context) -> pb.Empty:  # noqa: N802
        """The client goes of its own will."""
        session = self._check(request.sender)
        await self._coordinator.leave(session.client, "left")
        return pb.Empty()

    @answers
    async def Status(self, _: pb.StatusRequest, __: Context) -> pb.StatusReply:  # noqa: N802
        """What an operator wants to know."""
        reply: pb.StatusReply = await self._coordinator.ask(self._status)
        reply.metrics.update(self._coordinator.metrics)
        return reply

    def _status(self, machine: Machine) -> pb.StatusReply:
        clients = [
            pb.ClientStatus(client=client, state=record.state, updates=record.updates, refused=record.refused)
            for client, record in machine.clients.items()
        ]
        held, missing = machine.held
        return pb.StatusReply(
            metrics={"held_groups": held, "clients_missing": missing} if held else {},
            run_id=self._coordinator.run_id,
            version=machine.broadcast.version,
            updates=machine.updates,
            running_s=self._coordinator.running_s,
            finished=machine.finished,
            clients=clients,
        )

    # ---- tasks ---------------------------------------------------------------------------------

    @answers
    async def Tasks(self, request: pb.TasksRequest, context: Context) -> None:  # noqa: N802
        """Tasks as they are issued; a later stream of the same client ends this one."""
        session = self._check(request.sender)
        stream = session.stream = object()
        try:
            dispatched = session.dispatched
            task = await self._coordinator.ask(lambda machine: machine.task_of(session.client))
            if session.dispatched == dispatched:
                session.task = task
            await self._offer(session, stream, request.holding, context)
        finally:
            if session.stream is stream:
                session.stream = None
                session.touch()

    async def _offer(self, session: Session, stream: object, sent: str, context: Context) -> None:
        heartbeat_s = self.limits.liveness_s / 6
        while session.stream is stream:
            session.changed.clear()
            if session.ended:
                raise session.ended
            if self._coordinator.finished:
                await context.write(pb.TaskOffer(finished=self._coordinator.finished))
                session.told = True
                return
            if session.task and session.task.id != sent:
                sent = session.task.id
                await context.write(pb.TaskOffer(task=wire.task_to_pb(session.task)))
                continue
            try:
                await asyncio.wait_for(session.changed.wait(), heartbeat_s)
            except TimeoutError:
                await context.write(pb.TaskOffer(heartbeat=pb.Empty()))

    @answers
    async def Fail(self, request: pb.FailRequest, _: Context) -> pb.Empty:  # noqa: N802
        """The client's task comes to nothing. Harmless where it has ended already."""
        session = self._check(request.sender)
        await self._fail(session.client, request.task_id, wire.clip(request.reason, self.limits))
        return pb.Empty()

    async def _fail(self, client: str, task_id: str, reason: str) -> None:
        record = await self._coordinator.ask(lambda machine: machine.task(task_id))
        if record is not None and record.client == client and record.state in ("leased", "expired"):
            self._wrong_hashes.pop(task_id, None)
            self._coordinator.spool.drop(task_id)
            await self._coordinator.submit(Failed(0.0, client, task_id, reason))

    # ---- the model out -------------------------------------------------------------------------

    @answers
    async def Download(self, request: pb.DownloadRequest, context: Context) -> None:  # noqa: N802
        """One version of the model, from an offset."""
        session = self._check(request.sender)
        encoded = self._coordinator.versions.find(request.version)
        if encoded is None:
            raise TooStale(f"Version {request.version} is kept no more; drop the task and fetch a new one.")
        await context.write(pb.DownloadPart(manifest=encoded.manifest))
        for chunk in wire.chunks(encoded.buffers, request.offset, self.limits.chunk_bytes):
            await context.write(pb.DownloadPart(chunk=chunk))
            session.touch()

    # ---- updates in ----------------------------------------------------------------------------

    @answers
    async def UploadOffset(self, request: pb.UploadOffsetRequest, _: Context) -> pb.UploadOffsetReply:  # noqa: N802
        """How many bytes of an upload are here."""
        session = self._check(request.sender)
        counted = await self._admitted(session.client, request.task_id)
        offset = 0 if counted else self._coordinator.spool.offset(request.task_id)
        return pb.UploadOffsetReply(offset=offset, counted=counted)

    @answers
    async def Upload(self, parts: AsyncIterator[pb.UploadPart], _: Context) -> pb.UploadReply:  # noqa: N802
        """One update: begin, then chunks."""
        begin = (await anext(aiter(parts), pb.UploadPart())).begin
        wire.check_sender(begin.sender, self.limits)
        session = self._check(begin.sender)
        client, task_id = session.client, begin.task_id
        if await self._admitted(client, task_id):
            return pb.UploadReply(repeated_delivery=True)
        try:
            wire.check_begin(begin, self.limits)
            self._check_manifest(begin.manifest)
            stored = await self._receive(session, begin, parts)
        except (WrongManifest, WrongSize) as error:
            # No retry can mend these, so the machine hears that nothing will come. A cut upload ends otherwise.
            self._turned_away[task_id] = error
            if len(self._turned_away) > self.limits.max_clients:
                del self._turned_away[next(iter(self._turned_away))]
            await self._fail(client, task_id, error.reason)
            raise
        except WrongHash as error:
            wrong = self._wrong_hashes[task_id] = self._wrong_hashes.get(task_id, 0) + 1
            if wrong >= self.limits.max_refusals:
                await self._fail(client, task_id, error.reason)
            raise
        return await self._count(client, task_id, stored)

    async def _admitted(self, client: str, task_id: str) -> bool:
        try:
            return await self._coordinator.ask(lambda machine: _admit(machine, client, task_id))
        except TaskSpent as spent:
            raise self._turned_away.get(task_id, spent) from None

    async def _receive(self, session: Session, begin: pb.UploadBegin, parts: AsyncIterator[pb.UploadPart]) -> Stored:
        spool = self._coordinator.spool
        upload = await asyncio.to_thread(spool.begin, begin)
        try:
            await _take_all(session, upload, parts)
            stored = await asyncio.to_thread(upload.finish, self._coordinator.updates)
        finally:
            spool.end(upload, begin.task_id)
        return stored

    async def _count(self, client: str, task_id: str, stored: Stored) -> pb.UploadReply:
        self._wrong_hashes.pop(task_id, None)
        # Once it is whole it counts, whether or not the client still listens.
        effects = await asyncio.shield(self._coordinator.submit(stored))
        _raise_refusal(effects, client, task_id)
        return pb.UploadReply(repeated_delivery=any(isinstance(effect, Ack) and effect.repeated for effect in effects))

    def _check_manifest(self, manifest: pb.Manifest) -> None:
        """Exactly the vectors that the federation asks for, so that no byte of anything else is taken."""
        plan = self._coordinator.federation
        for blob in manifest.blobs:
            if blob.name != DELTA and blob.name not in plan.blobs:
                raise WrongManifest(f"Blob {blob.name!r} is none that this federation asks for; use its hooks.")
            if blob.dtype != "float32" or tuple(blob.shape) != (plan.layout.size,):
                found = f"{blob.dtype} {tuple(blob.shape)}"
                raise WrongManifest(f"Blob {blob.name!r} must be float32 ({plan.layout.size},), not {found}.")
        if not manifest.blobs:
            raise WrongManifest(f"The update has no blob {DELTA!r}.")

    def _check(self, sender: pb.Sender) -> Session:
        wire.check_sender(sender, self.limits)
        return self._coordinator.sessions.check(sender)


async def _take_all(session: Session, upload: Upload, parts: AsyncIterator[pb.UploadPart]) -> None:
    async for part in parts:
        if session.ended:
            raise session.ended
        session.touch()
        # Here and not in a thread: hashing and writing a chunk takes less than handing it over and back does.
        upload.take(part.chunk)


def _admit(machine: Machine, client: str, task_id: str) -> bool:
    """Whether the update of this task counts already. Raises a leaf of RefusedUpdate where none is awaited."""
    record = machine.task(task_id)
    if record is None:
        raise UnknownTask("No such task; fetch a new one.")
    if record.client != client:
        raise NotYourTask("This task was issued to another client.")
    if record.state == "counted":
        return True
    if machine.finished:
        raise TaskSpent("The run is over; nothing more counts.")
    if record.state in ("refused", "failed"):
        raise TaskSpent("This task has ended; fetch a new one.")
    return False


def _raise_refusal(effects: list[Effect], client: str, task_id: str) -> None:
    for effect in effects:
        if isinstance(effect, Refuse) and (effect.client, effect.task_id) == (client, task_id):
            raise wire.error_from(effect.reason, effect.status, effect.detail)
        if isinstance(effect, Evict) and effect.client == client:
            raise RefusedClient(f"This client is shut out of the run: {effect.reason}.")
