"""Hostile clients in a simulation: who they are, what they know, and what they send instead.

They are the strongest the literature assumes: when one sends, it sees the newest update of every honest client, even
one that is still under way. That can be had without changing a byte, since a client's training depends on its task,
its base version and its own state alone: what will be delivered later is trained now, and kept until then.

Owns N vectors, where the attack looks at them, and one per hostile client. Must never change what an honest client
sends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fedge.core.errors import ExperimentError, TrainerError
from fedge.core.params import Vector
from fedge.core.random import derive, generator
from fedge.core.task import Task, Update
from fedge.strategies.aggregators.robust import Robust
from fedge.strategies.attacks.scene import Fussy, Scene, misled
from fedge.strategies.contracts import Aggregator

Training = Callable[[], Update]


@dataclass(frozen=True, slots=True)
class Adversary:
    """`clients` of all are hostile and do as `attack` (fedge.strategies.attacks) says; `kind` is its name.

    `faster` divides the seconds they need for a step. `spared` is the name of a client that is never one of them.
    Raises ExperimentError where either makes no sense.
    """

    attack: Any
    clients: int = 1
    faster: float = 1.0
    kind: str = ""
    spared: str = ""

    def __post_init__(self) -> None:
        if self.clients < 1:
            raise ExperimentError(f"simulation.attack.clients: must be at least 1, not {self.clients}.")
        if not 0 < self.faster < float("inf"):
            raise ExperimentError(f"simulation.attack.faster: must be above 0 and finite, not {self.faster}.")

    def chosen(self, names: Sequence[str], seed: int) -> list[int]:
        """The hostile clients' indices, drawn from all but who is spared. Raises ExperimentError where no honest one
        would be left, or the attack asks for more of them.
        """
        among = len(names)
        if self.clients >= among:
            raise ExperimentError(
                f"simulation.attack.clients is {self.clients}, and there are {among} clients; leave an honest one."
            )
        if isinstance(self.attack, Fussy):
            self.attack.check(among - self.clients)
        drawn = [
            index for index in generator(seed, "attack").permutation(among).tolist() if names[index] != self.spared
        ]
        return sorted(drawn[: self.clients])


class Crew:
    """The hostile clients of one run, and what they know of the others. Clients are told by index."""

    def __init__(self, adversary: Adversary, names: Sequence[str], aggregator: Aggregator, seed: int) -> None:
        self.adversary, self._names, self._aggregator, self._seed = adversary, names, aggregator, seed
        self.members = frozenset(adversary.chosen(names, seed))
        self._begun: list[dict[str, Training]] = [{} for _ in names]  # by task, in the order of dispatch
        self._ahead: dict[str, Update | TrainerError] = {}  # trained before their time, by task
        self._newest: dict[int, Vector] = {}  # of each honest client
        self._first: dict[int, Vector] = {}  # of each hostile client
        self._lead: tuple[int, Vector] | None = None  # (version, what the first of them made of it)

    @property
    def names(self) -> list[str]:
        """Of the hostile clients."""
        return [self._names[index] for index in sorted(self.members)]

    def begin(self, index: int, task: Task, training: Training) -> None:
        """A client has a task; `training` does it, once."""
        self._begun[index][task.id] = training

    def deliver(self, index: int, task: Task) -> Update:
        """What the client sends for its task. Raises TrainerError as its trainer did, StrategyError for the attack."""
        self._train(index, task.id)
        found = self._ahead.pop(task.id)
        if isinstance(found, TrainerError):
            raise found
        if index not in self.members:
            return found
        sent = misled(self.adversary.attack, self._scene(index, task, found.delta), found)
        self._first.setdefault(index, found.delta)
        return sent

    def _train(self, index: int, until: str = "") -> None:
        """Do the client's tasks in the order it got them, as its state demands, up to the one named; or all."""
        begun = self._begun[index]
        while begun and (not until or until in begun):
            id_ = next(iter(begun))
            try:
                update = self._ahead[id_] = begun.pop(id_)()
            except TrainerError as error:
                self._ahead[id_] = error
                continue
            if self.adversary.attack.omniscient and index not in self.members:
                self._newest[index] = update.delta

    def _scene(self, index: int, task: Task, own: Vector) -> Scene:
        if self._lead is None or self._lead[0] < task.version:
            self._lead = (task.version, own)
        honest, aggregate = [own], None
        if self.adversary.attack.omniscient:
            others = [other for other in range(len(self._names)) if other not in self.members]
            for other in others:
                self._train(other)
            known = [other for other in others if other in self._newest]
            if known:
                honest = [self._newest[other] for other in known]
                aggregate = partial(self._aggregated, [*(self._names[other] for other in known), *self.names])
        past = [self._first[index]] if index in self._first else []
        seed = derive(self._seed, "attack", task.version)
        size, count = len(self.members), len(self._names)
        return Scene(own, honest, size, count, aggregate, past, self._lead[1], seed, self._names[index])

    def _aggregated(self, clients: Sequence[str], rows: Sequence[Vector]) -> Vector:
        """The federation's rule on these clients' rows, as in the first group of a run."""
        rule = self._aggregator
        if missing := rule.lacks(clients, rule.memory()):
            raise ExperimentError(f"The rule refuses {len(rows)} rows: it lacks {missing}.")
        if isinstance(rule, Robust):  # all at once, as a search asks many times
            state = rule.of(np.stack(rows), np.ones(len(rows)))
        else:
            state = rule.init(rows[0].size)
            for row in rows:
                state = rule.fold(state, row, 1.0)
        return rule.finish(state, clients, rule.memory(), self._seed).vector
