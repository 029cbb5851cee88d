"""Hostile clients in an experiment: from the table of an attack to who does what, and to the data they train on.

Owns the settings that every attack has, and the surgery by which examples are poisoned. Must never hold an attack.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from fedge.client.data import Dataset
from fedge.client.trainer import Shard
from fedge.core.errors import ExperimentError, FedgeError, StrategyError
from fedge.core.params import Array
from fedge.core.random import derive
from fedge.core.registry import explained
from fedge.experiment import Component, Experiment
from fedge.simulation.adversary import Adversary
from fedge.strategies import attacks


class _Hostile(msgspec.Struct, frozen=True):
    """What of an attack's table is not the attack's own."""

    clients: int = 1
    faster: float | None = None


def adversary(experiment: Experiment) -> Adversary | None:
    """Who attacks, and how; None where nobody does. Raises ExperimentError."""
    table = experiment.simulation.attack
    return None if table is None else replace(_adversary(table), spared=_root(experiment))


def _root(experiment: Experiment) -> str:
    """The client that others are compared with, if any: whoever names one vouches for it."""
    return str(experiment.server.aggregator.get("root", ""))


def remarks(experiment: Experiment) -> list[str]:
    """What may well be run, but protects less than it seems to."""
    server, found = experiment.server, []
    kind, f = server.aggregator["kind"], int(server.aggregator.get("byzantine", 0))
    if kind in ("mean", "average"):
        if f and not server.aggregator.get("pre"):
            found.append(
                f"server.aggregator {kind!r} withstands no hostile client although byzantine is {f}; take 'robust'."
            )
        return found
    crew = adversary(experiment)
    sampled = any(table.get("clients") for table in (server.scheduler, server.selector or {}))
    if crew and not sampled and "byzantine" in server.aggregator and not crew.spared and crew.clients > f:
        found.append(
            f"simulation.attack.clients is {crew.clients}, and server.aggregator withstands byzantine = {f} only; set "
            f"byzantine to {crew.clients} if the rule can, or attack with at most {f}."
        )
    return found


def _adversary(table: Component) -> Adversary:
    own = _attack_alone(table)
    try:
        hostile = msgspec.convert({key: table[key] for key in table if key not in own}, _Hostile)
    except msgspec.ValidationError as error:
        path, what = explained(error)
        if path == "clients" and what.endswith("got a list"):
            what += "; it is how many are hostile, who are drawn by the seed and cannot be named"
        raise ExperimentError(f"simulation.attack.{path}: {what}.") from None
    attack = attacks.build(own, _Hostile.__struct_fields__)
    faster = getattr(attack, "haste", 1.0) if hostile.faster is None else hostile.faster
    return Adversary(attack, hostile.clients, faster, str(own.get("kind", "")))


def _attack_alone(table: Component) -> Component:
    return {key: value for key, value in table.items() if key not in _Hostile.__struct_fields__}


def completed(table: Component) -> Component:
    """The table of an attack with every default written out. Raises ExperimentError."""
    hostile = _adversary(table)
    fields = {
        field.name: getattr(hostile.attack, field.name) for field in dataclasses.fields(hostile.attack) if field.init
    }
    return {"kind": hostile.kind, **fields, "clients": hostile.clients, "faster": hostile.faster}


def poisons(experiment: Experiment) -> bool:
    """Whether the attack is on the hostile clients' data."""
    attack = adversary(experiment)
    return attack is not None and isinstance(attack.attack, attacks.Poisons)


def poisoned(
    experiment: Experiment, dataset: Dataset, parts: list[Shard], names: Sequence[str]
) -> tuple[Dataset, list[Shard]]:
    """The data set with poisoned copies of the hostile clients' examples behind its own, and shards that point there:
    a trainer needs to know nothing of it. Honest clients keep their examples, also those they share with a hostile one.
    """
    hostile, seed = adversary(experiment), experiment.experiment.seed
    if hostile is None or not isinstance(hostile.attack, attacks.Poisons):
        return dataset, parts
    inputs, labels, sources, shifted = [dataset.x_train], [dataset.y_train], [], list(parts)
    count = len(dataset.y_train)
    for index in hostile.chosen(names, seed):
        mine = np.asarray(parts[index])
        x, y = _poison(hostile, dataset, mine, derive(seed, "poison", index))
        inputs.append(x)
        labels.append(y)
        sources.append(mine)
        shifted[index] = np.arange(count, count + len(mine))
        count += len(mine)
    columns = {name: np.concatenate([one, *(one[mine] for mine in sources)]) for name, one in dataset.columns.items()}
    more = Dataset(
        np.concatenate(inputs), np.concatenate(labels), dataset.x_test, dataset.y_test, dataset.classes, columns
    )
    return more, shifted


def _poison(hostile: Adversary, dataset: Dataset, mine: Shard, seed: int) -> tuple[Array, Array]:
    """What becomes of these examples. Raises StrategyError where the attack raises, or changes how many they are."""
    try:
        x, y = hostile.attack.poison(dataset.x_train[mine], dataset.y_train[mine], len(dataset.classes), seed)
    except FedgeError:
        raise
    except Exception as error:  # a plug-in boundary: whatever the user's code raises goes on with its name
        raise StrategyError(f"Attack {hostile.kind!r} raised {error!r} in poison(); mend it.") from error
    if not np.shape(x)[:1] == np.shape(y) == mine.shape:
        raise StrategyError(f"Attack {hostile.kind!r} made {np.shape(y)} labels of {len(mine)} examples; keep all.")
    return x, y
