"""A client's membership in one run: tasks come in, updates go out, and nothing finished is lost.

Owns the thread that listens for tasks, the mailbox it fills, the model last received, and the order of disk and
network: an update lies in the spool before it is sent, and is forgotten only when the coordinator has settled it.
Must never train: `runtime` and `script` do, each in its way.
"""

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from fedge.client.connection import Connection
from fedge.client.spool import Spool
from fedge.client.trainer import ClientState
from fedge.core.errors import FedgeError, ModelError, RefusedUpdate
from fedge.core.limits import Limits
from fedge.core.params import Layout
from fedge.core.task import Broadcast, Task, Update

log = logging.getLogger("fedge")


class Session:
    """Joins on construction; use it in a `with` block. One thread receives and sends.

    `layout` is that of the client's model (None takes any model), `examples` the size of its data set, `folder` where
    it keeps what must survive a restart (None: nothing does). `state` is the client's state as last kept.
    Raises ModelError, RefusedClient, DataError (the folder), AddressError (nobody answers).
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        examples: int,
        layout: Layout | None = None,
        folder: Path | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._layout = layout
        layout_hash = layout.hash if layout else ""
        self._connection = Connection(address, name, limits or Limits(), layout_hash=layout_hash, examples=examples)
        try:
            self.run_id = self._connection.join().run_id
            self._spool = Spool(folder, name, self.run_id) if folder else None
        except FedgeError:
            if self._connection.terms.run_id:  # joined, but the folder cannot be used
                self._connection.leave()
            self._connection.close()
            raise
        self.state: ClientState = self._spool.state if self._spool else {}
        self.finished = ""  # why the run ended, once it has
        self.unsettled = self._spool.pending if self._spool else None  # finished, and not known to have arrived
        self._holding = self.unsettled.task_id if self.unsettled else ""
        self._offered: Task | None = None
        self._error: FedgeError | None = None
        self._news = threading.Condition()
        self._broadcast: Broadcast | None = None
        self._download_s = self._upload_s = 0.0
        self._received_at = 0.0
        self._listener = threading.Thread(target=self._listen, name=f"fedge-{name}", daemon=True)
        self._listener.start()

    @property
    def bytes_up(self) -> int:
        """Payload sent so far, in bytes."""
        return self._connection.bytes_up

    @property
    def bytes_down(self) -> int:
        """Payload received so far, in bytes."""
        return self._connection.bytes_down

    def resend(self) -> bool:
        """Send the `unsettled` update of an earlier process; whether it had counted before. Raises as `send` does."""
        return self.unsettled is not None and self._deliver(self.unsettled, resume=True)

    def receive(self) -> tuple[Task, Broadcast] | None:
        """The next task and the model to start from; None once the run is finished. Blocks."""
        while (task := self._next()) is not None:
            try:
                broadcast = self._fetch(task.version)
            except RefusedUpdate as error:
                log.warning("task %s: version %d cannot be fetched: %s", task.id, task.version, error)
                self.fail(task, str(error))
                continue
            self._received_at = time.monotonic()
            return task, broadcast
        return None

    def send(self, update: Update, state: ClientState | None = None) -> bool:
        """Keep the update, send it and wait until it is settled; whether it had counted before (a repeat).

        Raises a leaf of RefusedUpdate where it does not count; the next task can be received all the same.
        """
        timings = {
            "download_s": self._download_s,
            "compute_s": time.monotonic() - self._received_at,
            "upload_s": self._upload_s,  # of the update before: this one's is not known yet
        }
        update = replace(update, timings={**timings, **update.timings})
        self.unsettled = update
        if self._spool:
            self._spool.keep(update, self.state if state is None else state)
        return self._deliver(update, resume=False)

    def fail(self, task: Task, why: str) -> None:
        """This task comes to nothing."""
        self._connection.fail(task.id, why)
        self._release(task.id)

    def close(self) -> None:
        """Leave, unless an update waits to be sent by the next process: its task must stay this client's."""
        if not self.finished and (self.unsettled is None or self._spool is None):
            self._connection.leave()
        self._connection.close()
        self._listener.join()

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- the listening thread ------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            finished = self._connection.listen(self._held, self._offer)
        except FedgeError as error:
            with self._news:
                self._error = error
                self._news.notify_all()
            return
        with self._news:
            self.finished = finished
            self._news.notify_all()

    def _held(self) -> str:
        with self._news:
            return self._offered.id if self._offered else self._holding

    def _offer(self, task: Task) -> None:
        """Only the newest task is kept: a coordinator that sends another has given up the one before."""
        with self._news:
            if task.id != self._holding:
                self._offered = task
                self._news.notify_all()

    # ---- the caller's thread -------------------------------------------------------------------

    def _next(self) -> Task | None:
        with self._news:
            self._news.wait_for(lambda: self._offered or self._error or self.finished)
            if self.finished:
                return None
            if self._error:
                raise self._error
            task, self._offered = self._offered, None
            assert task is not None  # noqa: S101 (wait_for has seen it)
            self._holding = task.id
            return task

    def _fetch(self, version: int) -> Broadcast:
        self._download_s = 0.0
        if self._broadcast is None or self._broadcast.version != version:
            start = time.monotonic()
            self._broadcast = None  # never two models in memory
            self._broadcast = self._connection.download(version)
            self._download_s = time.monotonic() - start
        size = self._broadcast.vector.size
        if self._layout and size != self._layout.size:
            raise ModelError(f"The model has {self._layout.size} parameters, the one received {size}; use one model.")
        return self._broadcast

    def _deliver(self, update: Update, *, resume: bool) -> bool:
        start = time.monotonic()
        try:
            repeated = self._connection.upload(update, resume=resume)
        except RefusedUpdate:
            self._settle(update)
            raise
        self._upload_s = time.monotonic() - start
        self._settle(update)
        return repeated

    def _settle(self, update: Update) -> None:
        if self._spool:
            self._spool.settle(update.task_id)
        self.unsettled = None
        self._release(update.task_id)

    def _release(self, task_id: str) -> None:
        with self._news:
            if self._holding == task_id:
                self._holding = ""
