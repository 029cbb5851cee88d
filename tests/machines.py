"""Small federations for tests: a machine with short vectors, and hands to play its clients."""

from dataclasses import replace

import numpy as np

from fedge.core.limits import Limits
from fedge.core.params import Layout
from fedge.core.task import Task, Update
from fedge.server.machine import Federation, Machine, Stop
from fedge.server.machine.events import Arrived, Dispatch, Effect, Event, Joined, Publish, Ticked, WakeAt
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.optimizers.sgd import Sgd
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.weighers.equal import Equal
from fedge.strategies.weighers.staleness import Constant

SIZE = 4


def federation(**changes):
    """FedAvg over SIZE elements, equal weights, no discount, no stop; with `changes`."""
    layout = Layout.of({"w": np.zeros(SIZE, np.float32)})
    plain = Federation(layout, FedAvg(steps=10), Equal(), Constant(), Mean(), Sgd(), expected=2, seed=7, stop=Stop())
    return replace(plain, **changes)


def update_for(task: Task, value: float = 1.0, **changes) -> Update:
    """An update whose delta is `value` everywhere."""
    delta = np.full(SIZE, value, np.float32)
    plain = Update(task.client, task.id, task.version, task.steps, 10, {"delta": delta}, metrics={"loss": 1.0})
    return replace(plain, **changes)


class Table:
    """A machine and what came out of it. `tasks` holds each client's outstanding task, `wakes` the times asked for."""

    def __init__(self, plan: Federation, machine: Machine | None = None) -> None:
        self.plan = plan
        self.machine = machine or Machine(plan, np.zeros(plan.layout.size, np.float32))
        self.tasks: dict[str, Task] = {}
        self.wakes: list[float] = []
        self.effects: list[Effect] = []
        self.seen: list[Effect] = []

    def feed(self, event: Event) -> list[Effect]:
        self.effects = self.machine.handle(event)
        self.seen += self.effects
        for effect in self.effects:
            if isinstance(effect, Dispatch):
                self.tasks[effect.client] = effect.task
            if isinstance(effect, WakeAt):
                self.wakes.append(effect.at)
        return self.effects

    def join(self, *names: str, now: float = 0.0) -> list[Effect]:
        return [effect for name in names for effect in self.feed(Joined(now, name, 10, self.plan.layout.hash))]

    def deliver(self, name: str, now: float, value: float = 1.0, **changes) -> list[Effect]:
        return self.feed(Arrived(now, update_for(self.tasks.pop(name), value, **changes)))

    def tick(self, now: float) -> list[Effect]:
        return self.feed(Ticked(now))

    def published(self) -> list[Publish]:
        return [effect for effect in self.effects if isinstance(effect, Publish)]

    def kinds(self) -> list[str]:
        return [getattr(effect, "kind", type(effect).__name__) for effect in self.effects]


def short(**limits) -> Limits:
    """Limits with some changed."""
    return Limits(**limits)
