"""The federation machine: events in, effects out, everything decided here and nowhere else.

Two rules. Everything that changes lives in `State`, so a snapshot plus the events after it *is* the federation. And
the machine knows no world: time comes with each event, randomness is derived from the seed, and no file, socket,
thread or clock is touched, so simulation, coordinator and replay are the same run.

A peer's bad input becomes a Refuse or Evict effect and changes nothing else. Only a broken plug-in raises
(StrategyError), and then the run is over.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from fedge.core.errors import (
    BadReport,
    FedgeError,
    ModelError,
    NotYourTask,
    RefusedClient,
    RefusedUpdate,
    StrategyError,
    TaskSpent,
    TooStale,
    UnknownTask,
)
from fedge.core.params import Array, Vector
from fedge.core.random import derive, token
from fedge.core.task import DELTA, Broadcast, Task, Update
from fedge.server.machine import pools, starving, state
from fedge.server.machine.events import (
    Ack,
    Arrived,
    Dispatch,
    Effect,
    Evaluated,
    Event,
    Evict,
    Failed,
    Finished,
    Joined,
    Left,
    Publish,
    Record,
    Refuse,
    Ticked,
    WakeAt,
)
from fedge.server.machine.lifecycles import CLIENT, POOL, TASK, advance
from fedge.server.machine.starving import HELD
from fedge.server.machine.state import ClientRecord, Federation, State, TaskRecord
from fedge.strategies import contracts as say
from fedge.strategies.contracts import Arrival, Fleet, Group, Verdict
from fedge.strategies.screen import screen

_VERDICTS = (say.Keep, say.Discard)


class Machine:
    """One federation. Feed it events in the order of their times; carry out the effects in the order given."""

    def __init__(self, federation: Federation, initial: Vector) -> None:
        """Version 0 is `initial`, float32 [d], taken over: do not write to it. Raises ModelError for another size."""
        if initial.shape != (federation.layout.size,):
            raise ModelError(f"The initial vector has shape {initial.shape}, the layout {federation.layout.size}.")
        vector = initial.view()
        vector.flags.writeable = False
        scheduler = federation.scheduler.init()
        self._begin(federation, State(vector, scheduler, federation.optimizer.init(vector)))

    @classmethod
    def restore(cls, federation: Federation, snapshot: bytes) -> "Machine":
        """The machine that `snapshot()` was taken of."""
        machine = cls.__new__(cls)
        machine._begin(federation, state.decode(snapshot, federation))
        return machine

    def _begin(self, federation: Federation, held: State) -> None:
        self._federation = federation
        self._state = held
        self._effects: list[Effect] = []
        examples = {
            name: record.examples for name, record in held.clients.items() if record.state not in ("absent", "evicted")
        }
        self._fleet = Fleet(federation.seed, federation.expected, held.now, held.version, held.idle, examples)
        self._expect()

    def snapshot(self) -> bytes:
        """All state, as bytes."""
        return b"".join(self.snapshot_parts())

    def snapshot_parts(self) -> list[bytes | memoryview]:
        """The same without a copy of any vector: buffers to write before the next event."""
        return state.encode(self._state)

    # ---- what the shells may look at -----------------------------------------------------------

    @property
    def broadcast(self) -> Broadcast:
        """The current version."""
        return Broadcast(self._state.version, self._state.vector, self._state.blobs)

    @property
    def clients(self) -> Mapping[str, ClientRecord]:
        """Every client that ever joined; read-only."""
        return self._state.clients

    @property
    def updates(self) -> int:
        """Updates that went into the model."""
        return self._state.updates

    @property
    def finished(self) -> str:
        """Why the run ended; empty while it goes on."""
        return self._state.finished

    @property
    def held(self) -> tuple[int, int]:
        """Groups held since the last version, and how many more clients they wait for."""
        return self._state.held_in_row, starving.missing(self._federation, self._state)

    @property
    def now(self) -> float:
        """The time of the last event, in seconds."""
        return self._state.now

    def task_of(self, client: str) -> Task | None:
        """The task a client holds: what to send again after a reconnect."""
        record = self._state.clients.get(client)
        if record is None or record.state != "training":
            return None
        return self._state.tasks[record.task].task(record.task)

    def task(self, id_: str) -> TaskRecord | None:
        """What was issued under this id, where it is still remembered."""
        return self._state.tasks.get(id_)

    def counted(self, id_: str) -> bool:
        """Whether an update for this task counts already."""
        record = self._state.tasks.get(id_)
        return record is not None and record.state == "counted"

    # ---- events --------------------------------------------------------------------------------

    def handle(self, event: Event) -> list[Effect]:
        """One event in; the effects it has. Raises StrategyError where a plug-in breaks its contract."""
        self._effects = []
        first = not self._state.clients
        self._state.now = self._fleet.now = max(self._state.now, event.now)
        self._stop_if_due()  # what comes after the end of the time does not count
        match event:
            case Arrived():
                self._on_arrived(event.update)
            case Joined():
                self._on_joined(event)
            case Failed():
                self._on_failed(event)
            case Left():
                self._on_left(event)
            case Evaluated():
                self._on_evaluated(event)
            case Ticked():
                self._on_ticked()
        if first and self._state.clients and self._federation.stop.seconds is not None:
            self._effects.append(WakeAt(self._federation.stop.seconds))
        self._stop_if_due()
        return self._effects

    def _on_joined(self, event: Joined) -> None:
        records, wanted = self._state.clients, self._federation.layout.hash
        known = records.get(event.client, ClientRecord())
        if known.state == "evicted":
            self._effects.append(Evict(event.client, "evicted earlier in this run"))
        elif event.layout_hash not in ("", wanted):
            error = ModelError("The client's model differs from the coordinator's; use the same factory on both sides.")
            self._refuse(event.client, "", error)
        else:
            was = known.state
            known.state, known.gone = advance(CLIENT, was, "joined"), False
            known.examples = self._fleet.examples[event.client] = event.examples
            records[event.client] = known
            if was != "training":
                known.task = ""
            if was in ("absent", "overdue"):
                self._record("joined", client=event.client, examples=event.examples)
                self._state.idle[event.client] = None
                self._signal(say.Ready(event.client))

    def _on_arrived(self, update: Update) -> None:
        record = self._state.tasks.get(update.task_id)
        if record is None:
            self._refuse(update.client, update.task_id, UnknownTask("No such task; fetch a new one."))
        elif record.client != update.client:
            self._refuse(update.client, update.task_id, NotYourTask("This task was issued to another client."))
        elif record.state == "counted":
            self._effects.append(Ack(update.client, update.task_id, repeated=True))
        elif self._state.clients[update.client].state == "evicted":
            self._refuse(update.client, update.task_id, RefusedClient("This client is shut out of the run."))
        elif self._state.finished:
            self._refuse(update.client, update.task_id, TaskSpent("The run is over; nothing more counts."))
        elif record.state in ("refused", "failed"):
            self._refuse(update.client, update.task_id, TaskSpent("This task has ended; fetch a new one."))
        else:
            self._weigh_in(update, record)

    def _weigh_in(self, update: Update, record: TaskRecord) -> None:
        try:
            norm = screen(update, self._federation.layout.size, self._federation.blobs, self._federation.limits)
            if update.base_version != record.version or update.steps > record.steps:
                claims = f"version {update.base_version} and {update.steps} steps"
                raise BadReport(f"The update claims {claims}; asked were {record.version} and at most {record.steps}.")
        except RefusedUpdate as error:
            self._refuse(update.client, update.task_id, error)
            self._bring_nothing(update.task_id, "refused")
            return
        staleness = self._state.version - record.version
        duration = self._state.now - record.dispatched
        arrival = Arrival(
            update.client, update.task_id, record.version, staleness, update.steps, record.steps, update.examples,
            duration, norm, dict(update.metrics), overdue=record.state == "expired",
        )  # fmt: skip
        self._release(update.client, update.task_id)
        self._signal(say.Arrived(arrival), update)

    def _on_failed(self, event: Failed) -> None:
        record = self._state.tasks.get(event.task_id)
        if record is None or record.client != event.client or record.state not in ("leased", "expired"):
            return
        self._record("failed", client=event.client, task=event.task_id, reason=event.reason)
        self._bring_nothing(event.task_id, "failed")

    def _on_left(self, event: Left) -> None:
        client = event.client
        if event.for_good:
            self._state.clients.setdefault(client, ClientRecord()).gone = True
        known = self._state.clients.get(client)
        if known is not None and known.state not in ("absent", "evicted"):
            awaited = self._part(client, "left")
            self._record("left", client=client, reason=event.reason)
            if awaited:
                self._signal(say.Lost(client))
        if event.for_good:
            self._finish_if_starved()

    def _on_evaluated(self, event: Evaluated) -> None:
        self._record("evaluated", version=event.version, **event.metrics)
        target = self._federation.stop.target
        if target is not None and event.metrics.get("accuracy", 0.0) >= target:
            self._finish("target")

    def _on_ticked(self) -> None:
        leases = self._state.leases
        while leases and (first := next(iter(leases.items())))[1] <= self._state.now:
            id_, client = first[0], self._state.tasks[first[0]].client
            known = self._state.clients[client]
            known.state = advance(CLIENT, known.state, "expired")
            self._expire(id_)
            self._record("expired", client=client, task=id_)
            self._signal(say.Lost(client))
        self._watch_leases()
        self._signal(say.Ticked())

    # ---- tasks and clients ---------------------------------------------------------------------

    def _watch_leases(self) -> None:
        """Ask to be woken for the oldest lease; leases are of equal length, so the oldest ends first."""
        deadline = next(iter(self._state.leases.values()), None)
        if deadline is not None and self._state.lease_wake <= self._state.now:
            self._state.lease_wake = deadline
            self._effects.append(WakeAt(deadline))

    def _dispatch(self, order: say.Train) -> None:
        held, known = self._state, self._state.clients.get(order.client)
        if known is None or known.state != "idle" or not 0 < order.steps <= self._federation.limits.max_steps:
            raise StrategyError(
                f"The scheduler asked {order.client!r} for {order.steps} steps; ask idle clients for 1 or more."
            )
        id_ = token(self._federation.seed, "task", held.issued)
        held.issued += 1
        hyper = {**self._federation.hyper, **order.hyper}
        held.tasks[id_] = TaskRecord(order.client, held.version, order.steps, held.now, hyper=hyper)
        held.leases[id_] = held.now + self._federation.limits.lease_s
        known.state, known.task = advance(CLIENT, known.state, "dispatched"), id_
        del held.idle[order.client]
        self._watch_leases()
        self._effects.append(Dispatch(order.client, held.tasks[id_].task(id_)))
        self._record("dispatched", client=order.client, task=id_, version=held.version, steps=order.steps)

    def _expire(self, id_: str) -> None:
        record = self._state.tasks[id_]
        record.state = advance(TASK, record.state, "expired")
        self._state.leases.pop(id_, None)
        self._remember(id_)

    def _release(self, client: str, id_: str) -> None:
        """The client has answered this task: it is idle, unless it is away or holds another."""
        known = self._state.clients[client]
        self._state.leases.pop(id_, None)
        if known.task == id_ and known.state in ("training", "overdue"):
            known.state, known.task = advance(CLIENT, known.state, "ended"), ""
            self._state.idle[client] = None

    def _end_task(self, id_: str, how: str) -> None:
        record = self._state.tasks[id_]
        record.state = advance(TASK, record.state, how)
        self._release(record.client, id_)
        self._remember(id_)

    def _remember(self, id_: str) -> None:
        """Keep the latest tasks nobody waits for, so that a repeated or late delivery is known for what it is."""
        ended = self._state.ended
        ended[id_] = None
        if len(ended) > self._federation.limits.remembered_tasks:
            oldest = next(iter(ended))
            del ended[oldest], self._state.tasks[oldest]

    def _bring_nothing(self, id_: str, how: str) -> None:
        """A task ends without an update: its client gets new work, unless it was one too many in a row."""
        waited_for = self._state.tasks[id_].state == "leased"
        client = self._state.tasks[id_].client
        self._end_task(id_, how)
        known = self._state.clients[client]
        known.refused += 1
        known.refused_in_row += 1
        if known.refused_in_row >= self._federation.limits.max_refusals:
            reason = f"{known.refused_in_row} tasks in a row brought nothing usable"
            waited_for |= self._part(client, "evicted")
            self._expect()
            self._effects.append(Evict(client, reason))
            self._record("evicted", client=client, reason=reason)
            self._finish_if_starved()
        if waited_for:
            self._signal(say.Lost(client))
        if known.state == "idle":
            self._signal(say.Ready(client))

    def _part(self, client: str, how: str) -> bool:
        """The client has left or is evicted; whether a task of its was still waited for."""
        known = self._state.clients[client]
        task = known.task if known.state == "training" else ""
        known.state, known.task = advance(CLIENT, known.state, how), ""
        self._state.idle.pop(client, None)
        self._fleet.examples.pop(client, None)
        if task:
            self._expire(task)
        return bool(task)

    def _refuse(self, client: str, task_id: str, error: FedgeError) -> None:
        self._effects.append(Refuse(client, task_id, error.reason, error.status, str(error)))
        self._record("refused", client=client, task=task_id, reason=error.reason, detail=str(error))

    def _expect(self) -> None:
        """Schedulers do not wait for who is shut out, nor keep a share of the step for them."""
        known, expected = self._state.clients.values(), self._federation.expected
        there = max(expected, len(known)) - sum(one.state == "evicted" for one in known)
        self._fleet.expected = max(1, min(expected, there))

    # ---- the scheduler and its orders ----------------------------------------------------------

    def _signal(self, signal: say.Signal, update: Update | None = None) -> None:
        """Tell the scheduler, carry out its orders, and tell it of every group that closed by them."""
        waiting = deque([(signal, update)])
        while waiting and not self._state.finished:
            told, kept = waiting.popleft()
            for order in self._ask(told, expects_verdict=kept is not None):
                match order:
                    case say.Train():
                        if not self._state.finished:
                            self._dispatch(order)
                    case say.Keep() | say.Discard() if kept is not None and isinstance(told, say.Arrived):
                        self._settle(order, kept, told.arrival)
                    case say.Close():
                        waiting.append((self._close(order), None))
                    case say.Wake():
                        self._effects.append(WakeAt(order.at))
                    case say.Note():
                        self._record(order.kind, **order.values)

    def _ask(self, signal: say.Signal, *, expects_verdict: bool) -> Sequence[say.Order]:
        scheduler = self._federation.scheduler
        name = type(scheduler).__name__
        try:
            self._state.scheduler, orders = scheduler.step(self._state.scheduler, signal, self._fleet)
        except FedgeError:
            raise
        except Exception as error:  # a plug-in boundary: who, at which stage, with what
            raise StrategyError(f"Scheduler {name} raised {error!r} on {type(signal).__name__}; mend it.") from error
        verdicts = sum(isinstance(order, _VERDICTS) for order in orders)
        if verdicts != expects_verdict:
            wanted = "one Keep or Discard" if expects_verdict else "neither Keep nor Discard"
            raise StrategyError(f"Scheduler {name} gave {verdicts} verdicts on {type(signal).__name__}; give {wanted}.")
        return orders

    def _settle(self, order: say.Keep | say.Discard, update: Update, arrival: Arrival) -> None:
        """An update that passed the screen is kept in a pool, or refused as too stale."""
        if isinstance(order, say.Discard):
            self._end_task(update.task_id, "refused")
            self._refuse(update.client, update.task_id, TooStale(order.why))
            return
        pool = self._state.pools.setdefault(order.pool, pools.Pool())
        plan = self._federation
        weights = plan.share.weigh(arrival), plan.staleness.weigh(arrival), order.share
        old = pools.fold(pool, plan.aggregator, update, arrival, weights)
        pool.state = advance(POOL, pool.state, "kept")
        self._end_task(update.task_id, "counted")
        known = self._state.clients[update.client]
        known.updates += 1
        known.refused_in_row = 0
        self._effects.append(Ack(update.client, update.task_id))
        self._record(
            "arrived", client=update.client, task=update.task_id, version=arrival.version, staleness=arrival.staleness,
            steps=arrival.steps, examples=arrival.examples, norm=arrival.norm, bytes=update.nbytes, pool=order.pool,
            late=order.late or arrival.overdue, timings=dict(update.timings), metrics=dict(update.metrics),
        )  # fmt: skip
        self._record_superseded(old)

    def _close(self, order: say.Close) -> say.Closed:
        plan, held = self._federation, self._state
        before = {member.client for member in held.pools[HELD].members} if HELD in held.pools else set()
        found = [held.pools.pop(name) for name in (HELD, *order.pools) if name in held.pools]
        if not found:
            name = type(plan.scheduler).__name__
            raise StrategyError(f"Scheduler {name} closed the empty pools {order.pools}; close what holds updates.")
        whole, old = pools.merged(found, plan.aggregator)
        # Steps of groups held back add up, to at most one whole step or what a single group asks for.
        whole.step = min(whole.step + order.step, max(1.0, order.step))
        self._record_superseded(old)
        members = tuple(whole.members)
        remembered = held.memory.get(DELTA) or plan.aggregator.memory()
        if missing := plan.aggregator.lacks([member.client for member in members], remembered):
            whole.state = advance(POOL, whole.state, "short")
            held.pools[HELD] = whole
            self._record("held", pools=order.pools, rows=len(members), missing=missing)
            held.held_in_row += 1
            waiting = len(held.clients) < plan.expected or {member.client for member in members} != before
            held.unchanged = 0 if waiting else held.unchanged + 1
            self._finish_if_starved()
            return say.Closed(order.pools, members, 0.0)
        whole.state = advance(POOL, whole.state, "closed")
        longest = plan.limits.max_update_norm * len(held.clients)
        seed = derive(plan.seed, "aggregate", held.version)
        closing = pools.finish(whole, plan.aggregator, held.memory, seed, plan.layout.size, longest)
        held.memory = closing.memory
        group = Group(
            order.pools, members, tuple(whole.weights), closing.scale, plan.expected, verdicts=closing.verdicts
        )
        vector, blobs = self._optimize(closing.aggregate, group)
        held.vector, held.blobs = vector, dict(blobs)
        held.version += 1
        held.held_in_row = held.unchanged = 0
        held.updates += len(members)
        self._fleet.version = held.version
        self._effects.append(Publish(self.broadcast))
        self._record_group(group, closing.norm)
        self._stop_if_due()
        return say.Closed(order.pools, members, closing.norm)

    def _optimize(self, aggregate: Mapping[str, Vector], group: Group) -> tuple[Vector, Mapping[str, Array]]:
        plan, held = self._federation, self._state
        buffers = slice(plan.layout.trainable, None)
        mean = held.vector[buffers] - aggregate[DELTA][buffers]
        held.optimizer, vector, blobs = plan.optimizer.step(held.optimizer, held.vector, aggregate, group)
        if vector.shape != held.vector.shape:
            raise StrategyError(f"optimizer {type(plan.optimizer).__name__} returned shape {vector.shape}")
        # Float buffers are statistics, not parameters: momentum or Adam could push a variance below zero.
        vector[buffers] = mean
        vector.flags.writeable = False
        return vector, blobs

    # ---- the end, and the record ---------------------------------------------------------------

    def _stop_if_due(self) -> None:
        stop, held = self._federation.stop, self._state
        due = {
            "updates": stop.updates is not None and held.updates >= stop.updates,
            "versions": stop.versions is not None and held.version >= stop.versions,
            "seconds": stop.seconds is not None and held.now >= stop.seconds,
        }
        for reason, reached in due.items():
            if reached:
                self._finish(reason)
                return

    def _finish_if_starved(self) -> None:
        """The rule will never have the clients it needs."""
        plan, held = self._federation, self._state
        if starving.starved(plan, held):
            self._finish("starved", needs=plan.aggregator.min_rows(), left=starving.left(plan, held))

    def _finish(self, reason: str, **why: int) -> None:
        if not self._state.finished:
            self._state.finished = reason
            self._effects.append(Finished(reason))
            self._record("finished", reason=reason, **why)

    def _record_superseded(self, members: Sequence[Arrival]) -> None:
        for member in members:
            self._record("superseded", client=member.client, task=member.task_id)

    def _record_group(self, group: Group, norm: float) -> None:
        members = [
            {"client": one.client, "task": one.task_id, "staleness": one.staleness, "weight": weight}
            | _said(group.verdicts.get(one.client))
            for one, weight in zip(group.members, group.weights)
        ]
        present = {one.client for one in group.members}
        absent = [
            {"client": client, **_said(verdict)} for client, verdict in group.verdicts.items() if client not in present
        ]
        more = {"absent": absent} if absent else {}
        version = self._state.version
        self._record(
            "aggregated", version=version, pools=group.pools, members=members, step=group.step, norm=norm, **more
        )

    def _record(self, kind: str, **values: object) -> None:
        self._effects.append(Record(self._state.now, kind, values))


def _said(verdict: Verdict | None) -> dict[str, Any]:
    """A verdict as it goes into the record."""
    if verdict is None:
        return {}
    shown = {"score": verdict.score, "rejected": verdict.rejected}
    return shown if verdict.coefficient is None else {**shown, "coefficient": verdict.coefficient}
