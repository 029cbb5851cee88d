# ruff: noqa: N802
"""A small coordinator in this process that keeps the protocol, and breaks it on demand.

Each client is given its tasks one after the other; the model moves by minus each delta. `faults` are taken one by one,
per method, by the calls that come.
"""

import threading
from collections import Counter, defaultdict
from concurrent import futures
from contextlib import contextmanager
from io import BytesIO

import grpc
import numpy as np

from fedge.core.errors import FedgeError, NotJoined, WrongHash
from fedge.core.limits import Limits
from fedge.core.params import Layout
from fedge.core.task import Broadcast, Task
from fedge.protos import fedge_pb2 as pb
from fedge.protos import fedge_pb2_grpc as rpc
from fedge.protos import wire

_PINGS = ("grpc.http2.min_recv_ping_interval_without_data_ms", 500)


class Upload:
    """What is spooled of one update; kept over restarts, as on disk."""

    def __init__(self, begin):
        self.begin = begin
        self.sink = BytesIO()
        self.receiver = wire.Receiver(begin.manifest, self.sink)


class FakeCoordinator(rpc.CoordinatorServicer):
    def __init__(self, vector, tasks=1, *, limits=None, layout=None):
        self.limits = limits or Limits(chunk_bytes=1000)
        self.layout = layout or Layout.of({"parameters": np.asarray(vector)})
        self.broadcasts = [Broadcast(0, np.array(vector, np.float32))]
        self.tasks_each = tasks
        self.run_id = "run-1"
        self.faults = defaultdict(list)  # method -> faults to come: an error, or bytes after which to cut
        self.calls = Counter()
        self.joins = []
        self.offsets = []  # at which uploads went on
        self.failures = []
        self.left = []
        self.told = []  # clients that know the run is over
        self.updates = {}  # task id -> update
        self.raw = {}  # task id -> the bytes received
        self.holding = {}
        self._uploads = {}
        self._done = Counter()  # tasks settled, by client
        self._incarnations = {}
        self._news = threading.Condition()
        self._open = False
        self.port = 0

    # ---- life ----------------------------------------------------------------------------------

    def start(self):
        self._open = True
        pool = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(pool, options=[("grpc.so_reuseport", 0), _PINGS])
        rpc.add_CoordinatorServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()
        return self

    def stop(self):
        with self._news:
            self._open = False
            self._news.notify_all()
        self._server.stop(0).wait()

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.stop()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def wait_for(self, condition, timeout_s=20):
        with self._news:
            assert self._news.wait_for(condition, timeout_s), "the coordinator waited in vain"

    # ---- faults --------------------------------------------------------------------------------

    @contextmanager
    def _answering(self, method, context):
        """Counts the call, breaks it where a fault is due, and turns errors into refusals."""
        with self._news:
            self.calls[method] += 1
            self._news.notify_all()
            due = self.faults[method] and self.faults[method][0]
            fault = self.faults[method].pop(0) if isinstance(due, (FedgeError, grpc.StatusCode)) else None
        try:
            if isinstance(fault, FedgeError):
                raise fault
            if fault is not None:
                context.abort(fault, "scripted")
            yield
        except FedgeError as error:
            status, detail, metadata = wire.refusal_of(error)
            context.set_trailing_metadata(metadata)
            context.abort(getattr(grpc.StatusCode, status), detail)

    def _cut(self, method):
        """After how many bytes to cut this transfer."""
        return self.faults[method].pop(0) if self.faults[method] else None

    def _known(self, sender):
        if self._incarnations.get(sender.client) != sender.incarnation:
            raise NotJoined("This incarnation has not joined; join first.")

    # ---- calls ---------------------------------------------------------------------------------

    def Join(self, request, context):
        with self._answering("Join", context):
            wire.check_join(request, self.limits)
            self._incarnations[request.sender.client] = request.sender.incarnation
            self.joins.append(request)
            return pb.JoinReply(
                run_id=self.run_id,
                layout_hash=self.layout.hash,
                chunk_bytes=self.limits.chunk_bytes,
                stream_timeout_s=self.limits.stream_timeout_s,
            )

    def task_of(self, client):
        number = self._done[client]
        if number == self.tasks_each:
            return None
        return Task(f"{client}-{number}", client, self.broadcasts[-1].version, steps=3 + number, hyper={"rate": 0.5})

    def Tasks(self, request, context):
        client, sent = request.sender.client, request.holding
        with self._answering("Tasks", context):
            self._known(request.sender)
            with self._news:
                self.holding[client] = request.holding
                while self._open and context.is_active():
                    task = self.task_of(client)
                    if task is None:
                        yield pb.TaskOffer(finished="updates")
                        self.told.append(client)
                        self._news.notify_all()
                        return
                    if task.id != sent:
                        sent = task.id
                        yield pb.TaskOffer(task=wire.task_to_pb(task))
                    self._news.wait(0.1)

    def Download(self, request, context):
        with self._answering("Download", context):
            self._known(request.sender)
            encoded = wire.encode_broadcast(self.broadcasts[request.version])
            cut = self._cut("Download")
            yield pb.DownloadPart(manifest=encoded.manifest)
            for chunk in wire.chunks(encoded.buffers, request.offset, self.limits.chunk_bytes):
                if cut == "garble":
                    chunk.data = bytes(len(chunk.data))
                elif cut is not None and chunk.offset >= cut:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "scripted cut")
                yield pb.DownloadPart(chunk=chunk)

    def UploadOffset(self, request, context):
        with self._answering("UploadOffset", context):
            self._known(request.sender)
            upload = self._uploads.get(request.task_id)
            return pb.UploadOffsetReply(
                offset=upload.receiver.offset if upload else 0, counted=request.task_id in self.updates
            )

    def Upload(self, parts, context):
        with self._answering("Upload", context):
            begin = next(parts).begin
            wire.check_begin(begin, self.limits)
            self._known(begin.sender)
            if begin.task_id in self.updates:
                return pb.UploadReply(repeated_delivery=True)
            self._receive(begin, parts, self._cut("Upload"), context)
            return self._count(begin, context)

    def _receive(self, begin, parts, cut, context):
        first = True
        for part in parts:
            upload = self._uploads.get(begin.task_id)
            if first:
                self.offsets.append(part.chunk.offset)
                if part.chunk.offset == 0 or upload is None or upload.begin.manifest != begin.manifest:
                    upload = self._uploads[begin.task_id] = Upload(begin)
                first = False
            upload.receiver.take(part.chunk)
            if isinstance(cut, int) and upload.receiver.offset >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "scripted cut")
        if cut == "garble":
            raise WrongHash("scripted")

    def _count(self, begin, context):
        client = begin.sender.client
        upload = self._uploads[begin.task_id]
        upload.receiver.finish()
        update = wire.update_from(begin, wire.decode_blobs(begin.manifest, upload.sink.getvalue()))
        self.raw[begin.task_id] = upload.sink.getvalue()
        with self._news:
            self.updates[begin.task_id] = update
            model = self.broadcasts[-1]
            self.broadcasts.append(Broadcast(model.version + 1, model.vector - update.delta))
            self._done[client] += 1
            self._news.notify_all()
        if self.faults["Ack"]:
            context.abort(self.faults["Ack"].pop(0), "scripted loss of the answer")
        return pb.UploadReply()

    def Fail(self, request, context):
        with self._answering("Fail", context):
            with self._news:
                self.failures.append((request.task_id, request.reason))
                self._done[request.sender.client] += 1
                self._news.notify_all()
            return pb.Empty()

    def Leave(self, request, context):
        self.left.append(request.sender.client)
        return pb.Empty()
