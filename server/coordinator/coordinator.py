"""The coordinator: the machine behind its journal, and the effects carried out.

Every event takes one way: it waits with others, they are journaled in one transaction, the machine hears of them, and
only then does anyone learn of an effect. Machine and journal live in one thread; everything else in the event loop.
Owns that order, the ticks, the evaluation and who has gone silent. Must never speak gRPC.
"""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from fedge.core.errors import FedgeError, JournalError, NotJoined, RefusedClient
from fedge.core.params import Vector
from fedge.server.coordinator.clock import Clock
from fedge.server.coordinator.facts import Fact, Stored, at
from fedge.server.coordinator.files import let_go
from fedge.server.coordinator.journal import Journal, passing
from fedge.server.coordinator.replay import Run, Shell, resume
from fedge.server.coordinator.sessions import Sessions
from fedge.server.coordinator.spool import Spool
from fedge.server.coordinator.versions import Versions
from fedge.server.machine import Federation, Machine
from fedge.server.machine.events import Dispatch, Effect, Evaluated, Evict, Finished, Left, Publish, Record, Ticked

T = TypeVar("T")
OnRecord = Callable[[Record], None]
Evaluate = Callable[[Vector], Mapping[str, float]]
Waiting = tuple[Fact, asyncio.Future[list[Effect]]]
_STOPPING = JournalError("The coordinator is stopping; try again later.")
_BATCH = 64  # events that share one transaction at most
_RETRY_S = 1.0  # between two ticks while the disk is full
_log = logging.getLogger("fedge")


@dataclass(frozen=True, slots=True)
class Watchers:
    """Who else wants to know: of each line of the record, and of each version worth measuring.

    `recorded` lines are known from before: after a restart, the record is given again from that line on.
    """

    on_record: OnRecord
    evaluate: Evaluate | None = None
    recorded: int = 0


class Coordinator:
    """One run on one state folder, from where its journal ends. Raises JournalError or ExperimentError."""

    def __init__(
        self,
        federation: Federation,
        initial: Vector,
        state_dir: Path,
        watchers: Watchers,
        experiment_text: str = "",
        keep_all: bool = False,
    ) -> None:
        self.federation = federation
        self.experiment_text = experiment_text
        self.sessions = Sessions()
        self.finished = ""
        self._watchers = watchers
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()
        self._wake_s: float | None = None
        self._rewake = asyncio.Event()
        self._unmeasured = asyncio.Event()
        self.ended = asyncio.Event()
        self._stored = 0  # updates journaled since the last snapshot
        words = (experiment_text, federation.layout.hash, str(federation.seed))
        identity = hashlib.sha256("\x1f".join(words).encode()).hexdigest()
        self._journal = Journal(state_dir, identity, secrets.token_hex(8), keep_all)
        try:
            self.spool = Spool(state_dir / "spool")
            self._restore(initial, state_dir / "versions")
        except BaseException:
            self._journal.close()
            raise
        self._clock = Clock(self._journal.now)
        self._thread = ThreadPoolExecutor(1, "fedge-machine")

    # ---- start and end -------------------------------------------------------------------------

    def _restore(self, initial: Vector, versions: Path) -> None:
        saved = self._journal.newest()
        self._run = resume(self.federation, saved) if saved else Run(Machine(self.federation, initial), Shell())
        self.versions = Versions(versions, self._run.machine.broadcast)
        if saved is None:
            self._save()
        for row in self._journal.rows(saved.seq if saved else 0):
            known = self._run.shell.records
            effects = self._run.replay(row, self._journal.updates)
            self._publish(effects)
            for line, record in enumerate((effect for effect in effects if isinstance(effect, Record)), known):
                if line >= self._watchers.recorded:
                    self._watchers.on_record(record)
            self._stored += isinstance(row.fact, Stored)
        self._readmit()

    def _readmit(self) -> None:
        """Clients that were connected may go on without joining again, if they come back in time."""
        machine = self._run.machine
        incarnations = self._journal.sessions()
        for client, record in machine.clients.items():
            if record.state not in ("absent", "evicted") and client in incarnations:
                self.sessions.admit(client, incarnations[client])
        self.finished = machine.finished
        self._recorded = self._run.shell.records
        self._wake_s = min(self._run.shell.wakes, default=None)
        if self.finished or self._run.shell.evaluated < machine.broadcast.version:
            self._unmeasured.set()

    async def run(self) -> None:
        """For ever; `ended` is set once the run is over and its last version measured. Raises where it cannot go on."""
        tasks = [asyncio.create_task(part) for part in (self._pump(), self._tick(), self._measure(), self._watch())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while not self._waiting.empty():
                _fail([self._waiting.get_nowait()], _STOPPING)

    def close(self) -> Machine:
        """After `run`: a last snapshot, and the state folder is let go. The machine as it ended."""
        self._thread.shutdown(wait=True)
        try:
            if self._recorded == self._run.shell.records:  # else the next start gives the rest of the record out
                with_care(self._save)
        finally:
            self._journal.close()
        return self._run.machine

    @property
    def run_id(self) -> str:
        """Drawn when the state folder was made."""
        return self._journal.run_id

    @property
    def running_s(self) -> float:
        """Seconds since the run began, downtime left out."""
        return self._clock.now()

    @property
    def metrics(self) -> Mapping[str, float]:
        """Of the last evaluation."""
        return self._run.shell.metrics

    @property
    def updates(self) -> Path:
        """The folder into which finished uploads go."""
        return self._journal.updates

    # ---- events in -----------------------------------------------------------------------------

    async def submit(self, fact: Fact) -> list[Effect]:
        """The effects of `fact`, once it is on disk and they are carried out. Raises JournalError."""
        future: asyncio.Future[list[Effect]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((fact, future))
        return await future

    async def _insist(self, fact: Fact) -> None:
        """Submit what nobody else would submit again: wait while the disk is full."""
        while True:
            try:
                await self.submit(fact)
                return
            except JournalError as error:
                if not passing(error):
                    raise
                await asyncio.sleep(_RETRY_S)

    async def ask(self, question: Callable[[Machine], T]) -> T:
        """An answer of the machine between two batches of events; `question` must change nothing."""
        return await self._call(lambda: question(self._run.machine))

    async def remember(self, client: str, incarnation: str) -> None:
        """Write down which incarnation of a client is the latest. Raises JournalError."""
        await self._call(lambda: self._journal.remember(client, incarnation))

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _pump(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            while not self._waiting.empty() and len(batch) < _BATCH:
                batch.append(self._waiting.get_nowait())
            try:
                outcomes = await self._call(lambda: self._commit([fact for fact, _ in batch]))  # noqa: B023 -- awaited here
            except JournalError as error:
                _fail(batch, error)
                if not passing(error):
                    raise
                _log.warning("%s", error)
                continue
            except BaseException:  # a broken plug-in, or the end: whoever waits must hear of it
                _fail(batch, _STOPPING)
                raise
            for effects, (_, future) in zip(outcomes, batch):
                for effect in effects:
                    self._carry_out(effect)
                if not future.done():
                    future.set_result(effects)
            self._rewake.set()
            # Only now: a snapshot says that the record up to it has been given out.
            published = any(isinstance(effect, Publish) for effects in outcomes for effect in effects)
            await self._call(lambda: self._save_if_due(published))  # noqa: B023 -- awaited here

    def _commit(self, facts: list[Fact]) -> list[list[Effect]]:
        """In the machine's thread: journal, then handle."""
        timed = [(self._clock.now(), fact) for fact in facts]
        self._journal.append(timed)
        outcomes = []
        for now, fact in timed:
            effects = self._run.handle(at(now, fact, self._journal.updates))
            self._publish(effects)
            outcomes.append(effects)
            if isinstance(fact, Stored):
                with contextlib.suppress(OSError):
                    let_go(self._journal.updates / fact.file)
        self._stored += sum(isinstance(fact, Stored) for fact in facts)
        self._wake_s = min(self._run.shell.wakes, default=None)
        return outcomes

    def _publish(self, effects: list[Effect]) -> None:
        machine = self._run.machine
        for effect in effects:
            if isinstance(effect, Publish):
                held = (machine.task_of(client) for client in machine.clients)
                needed = {task.version for task in held if task}
                with_care(lambda: self.versions.publish(effect.broadcast, needed))  # noqa: B023 -- called here

    def _save_if_due(self, published: bool) -> None:
        """Rather just after a new version, when the pools are empty and the state is small."""
        every = self.federation.limits.snapshot_updates
        if self._stored >= (every if published else 2 * every):
            with_care(self._save)

    def _save(self) -> None:
        machine = self._run.machine
        shell = msgspec.msgpack.encode(self._run.shell)
        self._journal.save(self._journal.now, machine.broadcast.version, shell, machine.snapshot_parts())
        self._stored = 0

    # ---- effects out ---------------------------------------------------------------------------

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Dispatch():
                session = self.sessions.find(effect.client)
                if session:
                    session.give(effect.task)
            case Publish():
                self._unmeasured.set()
            case Evict():
                self.sessions.drop(
                    effect.client, RefusedClient(f"This client is shut out of the run: {effect.reason}.")
                )
            case Finished():
                self.finished = effect.reason
                self.sessions.wake()
                self._unmeasured.set()
            case Record():
                self._recorded += 1
                self._watchers.on_record(effect)
            case _:
                pass  # Ack and Refuse are for who submitted; WakeAt is in the shell's memory

    # ---- what time and silence bring -----------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            wait_s = None if self._wake_s is None else self._wake_s - self._clock.now()
            if wait_s is not None and wait_s <= 0:
                await self._insist(Ticked(0.0))
                continue
            self._rewake.clear()
            try:
                await asyncio.wait_for(self._rewake.wait(), wait_s)
            except TimeoutError:
                continue

    async def _measure(self) -> None:
        """Evaluate the newest version, one at a time; the end of the run waits for the last."""
        evaluate = self._watchers.evaluate
        while True:
            await self._unmeasured.wait()
            self._unmeasured.clear()
            broadcast = await self.ask(lambda machine: machine.broadcast)
            if evaluate is not None and broadcast.version > self._run.shell.evaluated:
                metrics = await asyncio.to_thread(evaluate, broadcast.vector)
                figures = {name: float(value) for name, value in metrics.items()}
                await self._insist(Evaluated(0.0, broadcast.version, figures))
            if self.finished and not self._unmeasured.is_set():
                self.ended.set()

    async def _watch(self) -> None:
        """Clients that have gone silent have left; uploads nobody waits for are deleted."""
        liveness_s, lease_s = self.federation.limits.liveness_s, self.federation.limits.lease_s
        while True:
            await asyncio.sleep(liveness_s / 4)
            for session in self.sessions.silent(liveness_s):
                await self.leave(session.client, f"not connected for {liveness_s:g} s")
            for task_id, since_s in self.spool.tasks():
                record = await self.ask(lambda machine: machine.task(task_id))  # noqa: B023 -- awaited here
                awaited = record is not None and record.state in ("leased", "expired")
                if not awaited or time.time() - since_s > lease_s:
                    self.spool.drop(task_id)

    async def leave(self, client: str, reason: str) -> None:
        """A client has gone. Raises JournalError."""
        self.sessions.drop(client, NotJoined("This client was taken for gone; join again."))
        await self._insist(Left(0.0, client, reason))


def _fail(batch: list[Waiting], error: FedgeError) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)


def with_care(work: Callable[[], None]) -> None:
    """Do what the run can go on without; raises JournalError unless only the disk is full."""
    try:
        work()
    except JournalError as error:
        if not passing(error):
            raise
        _log.warning("%s", error)
