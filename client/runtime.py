"""The join loop: receive a task, train, send the update, until the run is finished.

Owns what happens when training fails. Must never decide how much to train or what an update is worth.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedge.client.session import Session
from fedge.client.trainer import Shard, Trainer, train
from fedge.core.errors import RefusedUpdate, TaskSpent, TrainerError
from fedge.core.limits import Limits
from fedge.core.task import Broadcast, Task, Update

log = logging.getLogger("fedge")
Progress = Callable[[str, Mapping[str, Any]], None]


@dataclass(slots=True)
class Summary:
    """What a client did in one run. `updates` count, `refused` do not; `failed` tasks raised in the trainer."""

    run_id: str
    finished: str = ""  # why the run ended
    updates: int = 0
    repeated: int = 0  # of the updates, those that had counted before
    refused: int = 0
    failed: int = 0
    version: int = 0  # the last one received
    bytes_up: int = 0
    bytes_down: int = 0


def run_client(
    address: str,
    name: str,
    trainer: Trainer,
    shard: Shard,
    *,
    folder: Path | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Be the client `name` of the coordinator at "host:port" until the run is finished. Blocks.

    `folder` keeps the client's state and an update not yet delivered, so that a killed client goes on where it was.
    `progress` hears ("received" | "sent" | "refused" | "failed", details); without one, refusals and failures are
    logged. An update that comes after the end of the run is neither sent nor refused. A task whose training fails is
    given back; after `limits.max_refusals` of them in a row TrainerError is raised. Further errors: see Session.
    """
    limits = limits or Limits()
    layout = trainer.layout
    with Session(address, name, examples=len(shard), layout=layout, folder=folder, limits=limits) as session:
        loop = _Loop(session, limits, progress or _log)
        if session.unsettled:
            loop.deliver(session.unsettled, session.resend)
        while (received := session.receive()) is not None:
            loop.admit_refusal()
            loop.work(trainer, shard, *received)
            del received  # or two models would be in memory while the next one comes
        return replace(
            loop.summary, finished=session.finished, bytes_up=session.bytes_up, bytes_down=session.bytes_down
        )


def _log(kind: str, details: Mapping[str, Any]) -> None:
    if kind in ("refused", "failed"):
        log.warning("task %s %s (%s): %s", details["task"], kind, details["reason"], details["detail"])


class _Loop:
    """The count of what became of each task."""

    def __init__(self, session: Session, limits: Limits, tell: Progress) -> None:
        self.summary = Summary(session.run_id)
        self._session = session
        self._limits = limits
        self._tell = tell
        self._failures = 0  # in a row
        self._spent: dict[str, str] = {}  # of an update refused because its task, or perhaps the run, was over

    def work(self, trainer: Trainer, shard: Shard, task: Task, broadcast: Broadcast) -> None:
        """One task, from model to settled update. Raises TrainerError at the last failure allowed."""
        self.summary.version = task.version
        self._tell("received", {"task": task.id, "version": task.version, "steps": task.steps})
        try:
            update = train(trainer, task, broadcast, shard, self._session.state)
        except TrainerError as error:
            self._failed(task, error)
            return
        self._failures = 0
        self.deliver(update, lambda: self._session.send(update))

    def deliver(self, update: Update, send: Callable[[], bool]) -> None:
        """Send, and count how it was settled."""
        try:
            repeated = send()
        except RefusedUpdate as error:
            log.info("the update of task %s was refused (%s): %s", update.task_id, error.reason, error)
            self._spent = {"task": update.task_id, "reason": error.reason, "detail": str(error)}
            if not isinstance(error, TaskSpent):
                self.admit_refusal()
            return
        self.summary.updates += 1
        self.summary.repeated += repeated
        self._tell("sent", {"task": update.task_id, "repeated": repeated, "metrics": update.metrics})

    def admit_refusal(self) -> None:
        """The last refusal counts: the run goes on, so it was not its end that spent the task."""
        if self._spent:
            self.summary.refused += 1
            self._tell("refused", self._spent)
            self._spent = {}

    def _failed(self, task: Task, error: TrainerError) -> None:
        self._failures += 1
        self.summary.failed += 1
        self._session.fail(task, str(error))
        self._tell("failed", {"task": task.id, "reason": error.reason, "detail": str(error)})
        if self._failures >= self._limits.max_refusals:
            raise error
