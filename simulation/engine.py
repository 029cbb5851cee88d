"""The simulation in virtual time: an event queue drives the machine, and every client really trains.

Owns the queue and the virtual clock. A client's training is done when its update is due, in this process or by a
worker that was asked at dispatch; either way it depends only on (seed, task, base version, the client's own state), so
one process and several give the same bytes. Must never decide anything the machine should.
"""

import hashlib
import heapq
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import numpy as np

from fedge.client.trainer import ClientState, Shard, Trainer, train
from fedge.core.errors import TrainerError
from fedge.core.params import Vector
from fedge.core.random import generator
from fedge.core.task import Broadcast, Task, Update
from fedge.server.machine import Federation, Machine
from fedge.server.machine.events import (
    Arrived,
    Dispatch,
    Evaluated,
    Event,
    Failed,
    Joined,
    Left,
    Publish,
    Record,
    Ticked,
    WakeAt,
)
from fedge.simulation.adversary import Adversary, Crew
from fedge.simulation.network import Line, Network
from fedge.simulation.pool import Pool
from fedge.simulation.speeds import StepTimes


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to: `vector` float32 [d], its SHA-256 `hash`; `now` in virtual and `wall_s` in real seconds."""

    vector: Vector
    version: int
    updates: int
    now: float
    wall_s: float
    hash: str
    finished: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """The moment an update reaches the coordinator."""

    index: int
    task: Task
    broadcast: Broadcast
    timings: Mapping[str, float]


class Simulation:
    """One run; `run()` once."""

    def __init__(
        self,
        federation: Federation,
        trainer: Trainer,
        shards: Sequence[Shard],
        speeds: StepTimes,
        network: Network = Network(),
        *,
        jitter: float = 0.05,
        processes: int = 0,
        worker_spec: tuple[str, Mapping[str, Any]] | None = None,
        evaluate_updates: int = 1,
        names: Sequence[str] | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        """`processes` > 1 trains in as many workers, each of which builds its trainer by `worker_spec`: the dotted
        path of a function and the plain settings it is called with. `names` are the clients' (client-000, ...), some
        of which are the `adversary`'s.
        """
        self._federation = federation
        self._trainer = trainer
        self._shards = shards
        self._speeds = speeds
        self._network = network
        self._jitter = jitter
        self._seed = federation.seed
        self._evaluate_updates = evaluate_updates
        self._names = list(names or (f"client-{index:03d}" for index in range(len(shards))))
        self._index = {name: index for index, name in enumerate(self._names)}
        self._crew = Crew(adversary, self._names, federation.aggregator, self._seed) if adversary else None
        self._pool = Pool(processes, *worker_spec, shards) if processes > 1 and worker_spec else None
        self._machine = Machine(federation, trainer.initial())
        self._current = self._machine.broadcast
        self._lines = [Line(network, index, self._seed) for index in range(len(shards))]
        leaving = network.drop_outs(len(shards), self._seed)
        self._drops_at = [leaving.get(index, inf) for index in range(len(shards))]
        self._tasks_done = [0] * len(shards)
        self._state: list[ClientState] = [{} for _ in shards]
        # Deltas are folded at once into an associative aggregate, so one buffer serves every client, unless a hostile
        # one remembers what it saw.
        shared = federation.aggregator.associative and not adversary
        self._delta = np.empty(federation.layout.size, np.float32) if shared else None
        self._queue: list[tuple[float, int, Event | Delivery]] = []
        self._order = itertools.count()
        self._meter = Meter()
        self._evaluated_updates = 0

    def run(
        self,
        on_record: Callable[[Record], None] = lambda _: None,
        on_metrics: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> Result:
        """Run until the stop criterion, or until nothing can happen any more ("idle"). Raises FedgeError leaves."""
        self._on_record, self._on_metrics = on_record, on_metrics
        self._started = time.perf_counter()
        try:
            if self._crew:
                on_record(Record(0.0, "hostile", {"clients": self._crew.names, "attack": self._crew.adversary.kind}))
            self._enrol()
            self._evaluate()
            while self._queue and not self._machine.finished:
                at, _, item = heapq.heappop(self._queue)
                self._handle(self._deliver(item, at) if isinstance(item, Delivery) else item)
            if self._evaluated_updates < self._machine.updates:
                self._evaluate()
        finally:
            if self._pool:
                self._pool.close()
        last = self._machine.broadcast
        digest = hashlib.sha256(last.vector.data).hexdigest()
        wall_s = time.perf_counter() - self._started
        finished = self._machine.finished or "idle"
        return Result(last.vector, last.version, self._machine.updates, self._machine.now, wall_s, digest, finished)

    # ---- the queue -----------------------------------------------------------------------------

    def _push(self, at: float, item: Event | Delivery) -> None:
        heapq.heappush(self._queue, (at, next(self._order), item))

    def _enrol(self) -> None:
        """Queue each client's coming, its outages that are long enough to be noticed, and its going."""
        notice_s = self._federation.limits.liveness_s
        for index, name in enumerate(self._names):
            joins, drops = self._network.joins_at(index, self._seed), self._drops_at[index]
            if joins < drops:
                self._push(joins, self._joined(index, joins))
            if drops < inf:
                self._push(drops + notice_s, Left(drops + notice_s, name, "dropped out", for_good=True))
            self._queue_outage(index, joins)

    def _queue_outage(self, index: int, after: float) -> None:
        """The next outage that the coordinator notices, as Left and Joined; the one after it is queued on return."""
        notice_s = self._federation.limits.liveness_s
        for begin, end in self._network.outages(index, self._seed):
            if begin >= self._drops_at[index]:
                return
            if begin > after and end - begin > notice_s:
                self._push(begin + notice_s, Left(begin + notice_s, self._names[index], "connection lost"))
                if end < self._drops_at[index]:
                    self._push(end, self._joined(index, end))
                return

    def _joined(self, index: int, at: float) -> Joined:
        return Joined(at, self._names[index], len(self._shards[index]), self._federation.layout.hash)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Joined) and event.now > self._network.joins_at(self._index[event.client], self._seed):
            self._queue_outage(self._index[event.client], event.now)
        published = False
        for effect in self._machine.handle(event):
            match effect:
                case Record():
                    self._meter.record(effect)
                    self._on_record(effect)
                case Dispatch():
                    self._dispatch(effect.task)
                case Publish():
                    self._current, published = effect.broadcast, True
                case WakeAt():
                    self._push(effect.at, Ticked(effect.at))
        if published and self._machine.updates - self._evaluated_updates >= self._evaluate_updates:
            self._evaluate()

    def _evaluate(self) -> None:
        metrics = dict(self._trainer.evaluate(self._current.vector))
        self._evaluated_updates = self._machine.updates
        if metrics:
            self._handle(Evaluated(self._machine.now, self._current.version, metrics))
        wall_s = time.perf_counter() - self._started
        line = {"t": self._machine.now, "wall_s": wall_s, "version": self._current.version}
        self._on_metrics({**line, "updates": self._machine.updates, **metrics, **self._meter.take()})

    # ---- clients -------------------------------------------------------------------------------

    def _dispatch(self, task: Task) -> None:
        """Work out when the update will be there, and queue it unless its client drops out before."""
        index, now = self._index[task.client], self._machine.now
        nbytes = self._current.vector.nbytes * (1 + len(self._current.blobs))
        self._meter.bytes_down += nbytes
        received = self._lines[index].transfer(now, nbytes)
        computed = received + task.steps * self._step_s(index)
        delivered = self._lines[index].transfer(computed, nbytes)
        self._tasks_done[index] += 1
        if delivered >= self._drops_at[index]:
            return
        timings = {"download_s": received - now, "compute_s": computed - received, "upload_s": delivered - computed}
        due = Delivery(index, task, self._current, timings)
        self._push(delivered, due)
        if self._pool:
            self._pool.submit(index, task, self._current)
        if self._crew:
            self._crew.begin(index, task, partial(self._train, due))

    def _step_s(self, index: int) -> float:
        number = self._tasks_done[index]
        mean = self._speeds.step_s(index, number, self._seed)
        if self._crew and index in self._crew.members:
            mean /= self._crew.adversary.faster
        if not self._jitter:
            return mean
        drawn = generator(self._seed, "jitter", index, number).normal(mean, self._jitter * mean)
        return max(float(drawn), mean / 10)

    def _deliver(self, due: Delivery, now: float) -> Event:
        """The update, or the trainer's failure, at the time it is due."""
        try:
            update = self._crew.deliver(due.index, due.task) if self._crew else self._train(due)
            return Arrived(now, _timed(update, due.timings))
        except TrainerError as error:
            return Failed(now, due.task.client, due.task.id, str(error))

    def _train(self, due: Delivery) -> Update:
        if self._pool:
            return self._pool.result(due.index, due.task)
        shard, held = self._shards[due.index], self._state[due.index]
        return train(self._trainer, due.task, due.broadcast, shard, held, self._delta)


def _timed(update: Update, timings: Mapping[str, float]) -> Update:
    """`update` with the virtual timings. Spelled out: dataclasses.replace costs a tenth of a whole client-round."""
    one = update
    return Update(one.client, one.task_id, one.base_version, one.steps, one.examples, one.blobs, timings, one.metrics)


class Meter:
    """What a line of metrics.jsonl adds up between two evaluations."""

    def __init__(self) -> None:
        self.bytes_up = self.bytes_down = 0
        self._staleness: list[int] = []
        self._losses: list[float] = []

    def record(self, record: Record) -> None:
        """Count one record."""
        if record.kind == "arrived":
            self.bytes_up += record.values["bytes"]
            self._staleness.append(record.values["staleness"])
            if "loss" in record.values["metrics"]:
                self._losses.append(record.values["metrics"]["loss"])

    def take(self) -> dict[str, float | int | None]:
        """The sums so far and the means since the last call."""
        staleness, losses, self._staleness, self._losses = self._staleness, self._losses, [], []
        return {
            "train_loss": sum(losses) / len(losses) if losses else None,
            "staleness": sum(staleness) / len(staleness) if staleness else None,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }
