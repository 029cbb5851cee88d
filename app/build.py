"""From an experiment to objects: data set, shards, trainer, federation, speeds, simulation.

Owns the wiring by name, the defaults that follow from other settings, and the refusal of combinations that cannot
work, each with a sentence that says why. Must never hold an algorithm. Torch is imported only where a trainer is built.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedge import experiment as experiments
from fedge import hostile
from fedge.client.data import PARTITIONS, Dataset, Partition, counts, load
from fedge.client.trainer import Shard, Trainer
from fedge.core import registry
from fedge.core.errors import ExperimentError, TrainerError
from fedge.core.params import Layout
from fedge.core.registry import Registry
from fedge.experiment import Component, Experiment
from fedge.server.machine import Federation, Stop
from fedge.simulation import SPEEDS, Network, Simulation
from fedge.strategies import aggregators
from fedge.strategies.aggregators.robust import Robust
from fedge.strategies.contracts import Aggregator, Scheduler
from fedge.strategies.hooks import HOOKS
from fedge.strategies.optimizers import OPTIMIZERS
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.selectors import SELECTORS
from fedge.strategies.weighers import STALENESS, WEIGHERS

# What goes with a scheduler where the file says nothing. FedCompass is best without a discount and with momentum
# (docs/schedulers.md has the figures); rounds know no staleness; the others are as published.
STALENESS_FOR = {"fedasync": "polynomial", "fedbuff": "polynomial"}
COMPASS_MOMENTUM = 0.6
# With a cache every client's last row is in every aggregate, and pushes on by itself.
CACHED_MOMENTUM = 0.3
HALVES = ("scaffold", "feddyn")  # algorithms with a hook on the client and an optimizer on the server


def load_experiment(path: Any, overrides: Sequence[str] = ()) -> Experiment:
    """Read, complete and check an experiment file. Raises ExperimentError with one sentence."""
    return settled(experiments.load(path, overrides))


def settled(experiment: Experiment) -> Experiment:
    """The experiment with every setting that follows from others filled in. Raises ExperimentError where some cannot
    go together. Settling twice changes nothing.
    """
    data = experiments.plain(experiment)
    partition, server = data["data"]["partition"], data["server"]
    if partition.get("kind") != "natural":
        partition.setdefault("clients", 10)
    hooks = [hook.get("kind") for hook in data["client"]["hooks"]]
    if server["scheduler"].get("kind") == "compass" and isinstance(aggregators.build(server["aggregator"]), Robust):
        server["aggregator"].setdefault("cache", True)  # its groups are small: the rule is to see the absent, too
    server.setdefault("optimizer", _optimizer_for(server, hooks))
    server.setdefault("weigher", {"kind": _weigher_for(server)})
    server.setdefault("staleness", {"kind": STALENESS_FOR.get(_kind(server["scheduler"]), "constant")})
    data["data"]["partition"] = complete(PARTITIONS, partition)
    for slot, table in _SERVER_SLOTS.items():
        if slot in server:
            server[slot] = complete(table, server[slot])
    server["aggregator"] = aggregators.completed(server["aggregator"])
    data["simulation"]["speeds"] = complete(SPEEDS, data["simulation"]["speeds"])
    if "attack" in data["simulation"]:
        data["simulation"]["attack"] = hostile.completed(data["simulation"]["attack"])
    data["client"]["hooks"] = [complete(HOOKS, hook) for hook in data["client"]["hooks"]]
    found = experiments.of(data)
    _check_pairs(found, hooks)
    _check_sizes(found)
    return found


_SERVER_SLOTS: Mapping[str, Registry] = {
    "scheduler": SCHEDULERS,
    "selector": SELECTORS,
    "weigher": WEIGHERS,
    "staleness": STALENESS,
    "optimizer": OPTIMIZERS,
}


def complete(kinds: Registry, table: Component) -> Component:
    """A component's table with its defaults written out, so that a run folder says all. Raises ExperimentError."""
    built = kinds.build(table)
    values = {field.name: getattr(built, field.name) for field in dataclasses.fields(built) if field.init}
    plain = {
        name: value for name, value in values.items() if isinstance(value, bool | int | float | str | list | tuple)
    }
    return {"kind": table["kind"], **plain, **table}


def _optimizer_for(server: Mapping[str, Any], hooks: Sequence[Any]) -> Component:
    scheduler = server["scheduler"]
    if scheduler.get("kind") == "fedat":
        return {"kind": "fedat", "tiers": SCHEDULERS.build(scheduler).tiers}
    for half in HALVES:
        if half in hooks:
            return {"kind": half}
    weigher = server.get("weigher", {})
    if weigher.get("kind") == "fednova":
        return {"kind": "fednova", "momentum": WEIGHERS.build(weigher).momentum}
    if scheduler.get("kind") == "compass":
        beta = CACHED_MOMENTUM if server["aggregator"].get("cache") else COMPASS_MOMENTUM
        return {"kind": "momentum", "beta": beta}
    return {"kind": "sgd"}


def _weigher_for(server: Mapping[str, Any]) -> str:
    if server["optimizer"].get("kind") == "fednova":
        return "fednova"
    alike = server["optimizer"].get("kind") in HALVES or server["scheduler"].get("kind") == "compass"
    # A client's own count of its examples is no business of a robust rule, unless somebody asks for it.
    return "equal" if alike or not aggregators.build(server["aggregator"]).associative else "examples"


# ---- what cannot work --------------------------------------------------------------------------


def _check_pairs(experiment: Experiment, hooks: Sequence[Any]) -> None:
    """Algorithms whose halves stand in different slots."""
    server = experiment.server
    optimizer, weigher = _kind(server.optimizer), _kind(server.weigher)
    for half in HALVES:
        if half in hooks and optimizer != half:
            raise ExperimentError(
                f"The hook {half!r} needs the server.optimizer {half!r}, not {optimizer!r}; name that one, or none."
            )
        if optimizer == half and half not in hooks:
            raise ExperimentError(
                f"The optimizer {half!r} needs the hook {half!r} in client.hooks; it cannot work alone."
            )
    if (weigher == "fednova") != (optimizer == "fednova"):
        raise ExperimentError(
            "FedNova needs both server.weigher and server.optimizer of kind 'fednova'; name both or none."
        )
    if (_kind(server.scheduler) == "fedat") != (optimizer == "fedat"):
        raise ExperimentError(
            "FedAT needs both server.scheduler and server.optimizer of kind 'fedat'; name both or none."
        )
    for key, first, second in (
        ("tiers", server.scheduler if optimizer == "fedat" else {}, server.optimizer),
        ("momentum", server.weigher if optimizer == "fednova" else {}, server.optimizer),
    ):
        if first and second and first.get(key) != second.get(key):
            raise ExperimentError(
                f"server.optimizer.{key} is {second.get(key)} but its other half says {first.get(key)}."
            )


def _check_sizes(experiment: Experiment) -> None:
    """What asks for more clients than there are."""
    clients = expected(experiment)
    if not clients:
        return  # a natural partition: as many as the data set has
    _check_aggregator(experiment, clients)
    if attack := hostile.adversary(experiment):
        attack.chosen(client_names(clients), experiment.experiment.seed)
    scheduler(experiment)
    server = experiment.server
    for where, table in (("scheduler", server.scheduler), ("selector", server.selector or {})):
        for key in ("clients", "min_clients", "tiers"):
            asked = table.get(key, 0)
            if isinstance(asked, int) and asked > clients:
                raise ExperimentError(
                    f"server.{where}.{key} is {asked}, and there are {clients} clients; set it lower."
                )


def _check_aggregator(experiment: Experiment, clients: int) -> None:
    """A rule that could never run, or would not do what the file says."""
    server, rule = experiment.server, aggregator(experiment)
    if not rule.honours_weights and _kind(server.weigher) == "examples":
        raise ExperimentError(
            f"server.aggregator {aggregators.named(server.aggregator)} ignores weights, so server.weigher 'examples' "
            'would change nothing; set the weigher to { kind = "equal" }, or take a rule that honours weights, such as '
            "'geometric-median'."
        )
    asked = min(int(table.get("clients", clients)) for table in (server.scheduler, server.selector or {}))
    present = clients if server.aggregator.get("cache") else min(clients, asked)
    needed = rule.min_rows()
    if needed > present:
        sampled = (
            f"{present} of the {clients} clients take part in a round"
            if present < clients
            else f"there are {clients} clients"
        )
        raise ExperimentError(
            f"server.aggregator {aggregators.named(server.aggregator)} with byzantine = "
            f"{server.aggregator.get('byzantine', 0)} needs {needed} clients at once, and {sampled}; "
            f"{_remedy(server.aggregator, present)}, or have at least {needed} take part."
        )


def _remedy(table: Component, present: int) -> str:
    """What lets a rule run with so many clients."""
    fits = aggregators.most_byzantine(table, present, lambda rule: rule.min_rows() <= present)
    if fits is not None:
        return f"set byzantine to at most {fits}"
    alone = aggregators.build({**table, "pre": []}).min_rows() if table.get("pre") else present + 1
    return f"leave out pre, without which it needs {alone}" if alone <= present else "take another rule"


def _kind(table: Component | None) -> str:
    return str((table or {}).get("kind", ""))


# ---- objects -----------------------------------------------------------------------------------


def expected(experiment: Experiment) -> int:
    """N, the number of clients; 0 where only the data set can tell."""
    return int(experiment.data.partition.get("clients", 0))


def scheduler(experiment: Experiment) -> Scheduler:
    """The scheduler, with its selector where one is named."""
    built: Any = SCHEDULERS.build(experiment.server.scheduler)
    if experiment.server.selector is None:
        return built  # type: ignore[no-any-return]
    if "selector" not in {field.name for field in dataclasses.fields(built)}:
        kind = _kind(experiment.server.scheduler)
        raise ExperimentError(f"server.selector: the scheduler {kind!r} has no rounds to select for; leave it out.")
    return dataclasses.replace(built, selector=SELECTORS.build(experiment.server.selector))  # type: ignore[no-any-return]


def aggregator(experiment: Experiment) -> Aggregator:
    """The aggregator."""
    return aggregators.build(experiment.server.aggregator)


def federation(experiment: Experiment, layout: Layout, clients: int) -> Federation:
    """The plan of a run for a model of that layout and so many clients. Needs no torch."""
    server, general = experiment.server, experiment.experiment
    optimizer = OPTIMIZERS.build(server.optimizer or {"kind": "sgd"})
    stop = general.stop
    return Federation(
        layout=layout,
        scheduler=scheduler(experiment),
        share=WEIGHERS.build(server.weigher or {"kind": "examples"}),
        staleness=STALENESS.build(server.staleness or {"kind": "constant"}),
        aggregator=aggregator(experiment),
        optimizer=optimizer,
        expected=clients,
        seed=general.seed,
        stop=Stop(stop.updates, stop.versions, stop.seconds, stop.target),
        limits=experiment.deploy.limits,
        blobs=getattr(optimizer, "blobs", frozenset()),
    )


def shards(experiment: Experiment, dataset: Dataset) -> list[Shard]:
    """One shard per client."""
    partition: Partition = PARTITIONS.build(experiment.data.partition)
    return partition.split(dataset.y_train, dataset.columns, experiment.experiment.seed)


def partition_summary(dataset: Dataset, parts: list[Shard]) -> dict[str, Any]:
    """The `partition` of summary.json: examples of each class by client."""
    table = counts(dataset.y_train, parts, len(dataset.classes)).tolist()
    return {"classes": list(dataset.classes), "counts": table, "clients": client_names(len(parts))}


def client_names(count: int) -> list[str]:
    """The names of simulated clients, and of those that join with a shard."""
    return [f"client-{index:03d}" for index in range(count)]


def trainer(experiment: Experiment, dataset: Dataset) -> Trainer:
    """The trainer over all of the data set. Raises ExperimentError, ModelError, TrainerError."""
    if experiment.client.trainer == "torch":
        return _torch_trainer(experiment, dataset)
    builder = registry.load(experiment.client.trainer, "client.trainer")
    path = experiment.client.trainer
    try:
        built: Any = builder(experiment, dataset)
    except Exception as error:  # a plug-in boundary: whatever the user's code raises goes on with its name
        raise TrainerError(f"client.trainer: {path!r} raised {error!r}; mend it.") from error
    missing = [name for name in ("initial", "train", "evaluate") if not callable(getattr(built, name, None))]
    if not isinstance(getattr(built, "layout", None), Layout):
        missing.insert(0, "layout")
    if missing:
        raise TrainerError(
            f"client.trainer: {path!r} returned {type(built).__name__}, which is no trainer: it lacks "
            f"{', '.join(missing)}; see fedge.client.trainer.Trainer."
        )
    found: Trainer = built
    return found


def measurable(experiment: Experiment, dataset: Dataset) -> bool:
    """Whether versions can be measured; a trainer of one's own may have its own test set."""
    return len(dataset.x_test) > 0 or experiment.client.trainer != "torch"


def check_target(experiment: Experiment, dataset: Dataset) -> None:
    """Raises ExperimentError for a target that can never be met, because there is nothing to measure it on."""
    target = experiment.experiment.stop.target
    if target is not None and not measurable(experiment, dataset):
        raise ExperimentError(
            f"experiment.stop.target is {target}, and the data set has no test images to measure it on; "
            "add some, or leave the target out."
        )


def _torch_trainer(experiment: Experiment, dataset: Dataset) -> Trainer:
    try:
        from fedge.client.torch_trainer import TorchTrainer
    except ImportError as error:
        if error.name != "torch":
            raise
        raise ExperimentError("This model needs PyTorch; pip install '.[torch]' in fedge's folder.") from None
    client = experiment.client
    return TorchTrainer(
        registry.load(experiment.model.factory, "model.factory"),
        dataset,
        batch_size=client.batch_size,
        optimizer=client.optimizer,
        hooks=[HOOKS.build(hook) for hook in client.hooks],
        seed=experiment.experiment.seed,
    )


def trainer_from(settings: Mapping[str, Any]) -> Trainer:
    """The trainer of an experiment given as plain data: how a worker process builds its own."""
    experiment = experiments.of(settings)
    dataset = load(experiment.data.dataset)
    if hostile.poisons(experiment):
        parts = shards(experiment, dataset)
        dataset, _ = hostile.poisoned(experiment, dataset, parts, client_names(len(parts)))
    return trainer(experiment, dataset)


def simulation(experiment: Experiment, built: Trainer, parts: list[Shard]) -> Simulation:
    """The run in virtual time, ready to go; trainer and shards are those of the poisoned data, where it is."""
    settings, rule, names = experiment.simulation, aggregator(experiment), client_names(len(parts))
    if missing := rule.lacks(names, rule.memory()):
        raise ExperimentError(_never_runs(experiment.server.aggregator, names, missing))
    network = Network(**{name: getattr(settings.network, name) for name in settings.network.__struct_fields__})
    return Simulation(
        federation(experiment, built.layout, len(parts)),
        built,
        parts,
        SPEEDS.build(settings.speeds),
        network,
        jitter=settings.jitter,
        processes=settings.processes,
        worker_spec=("fedge.build:trainer_from", experiments.plain(experiment)),
        evaluate_updates=experiment.experiment.evaluate_updates,
        names=names,
        adversary=hostile.adversary(experiment),
    )


def _never_runs(table: Component, names: Sequence[str], missing: str) -> str:
    """That a rule misses something although all clients are there."""
    fits = aggregators.most_byzantine(table, len(names), lambda rule: not rule.lacks(names, rule.memory()))
    remedy = "" if fits is None else f"set byzantine to at most {fits}, or take more clients; "
    return (
        f"server.aggregator {aggregators.named(table)} can never run here: it lacks {missing}; {remedy}"
        f"clients are {names[0]} to {names[-1]}."
    )
