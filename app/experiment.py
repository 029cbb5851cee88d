"""The experiment file: TOML in, frozen settings out, and back to TOML as resolved.

Owns every key, its default and its unit, and the sentence a user reads when one is wrong. An empty file is a valid
experiment. A component is a table `{ kind = "...", ... }` that stays plain data here: fedge.build turns it into an
object. Must never import a strategy, a data set or a framework.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta, Struct

from fedge import toml
from fedge.core.errors import ExperimentError
from fedge.core.limits import Limits
from fedge.core.registry import explained, nearest

Component = dict[str, Any]
COMPONENTS = (Component, Component | None)  # what a key may be typed as
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

UPDATES_IF_ENDLESS = 2000  # a stop without updates, versions or seconds might never come
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_IN_WORDS = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or a digit"
TRACKERS = ("files", "tensorboard")
# What stays when --set names another kind: the settings that every kind of that table has.
KEPT = {
    "data.partition": ("clients",),
    "server.aggregator": ("byzantine", "cache", "momentum"),
    "simulation.attack": ("clients", "faster"),
}
LESS = {"mean": (), "local-clipping": ("byzantine",)}  # but for these, which have not all of them


def component(kind: str, **settings: Any) -> Any:
    """A default component table, new for each experiment."""
    return msgspec.field(default_factory=lambda: {"kind": kind, **settings})


class Stop(Struct, frozen=True, kw_only=True):
    """When a run ends: whichever comes first. Without updates, versions and seconds it ends after 2000 updates."""

    updates: Count | None = None  # accepted updates
    versions: Count | None = None  # published versions of the model
    seconds: Positive | None = None  # since the start: virtual in a simulation, real behind a coordinator
    target: Annotated[float, Meta(gt=0, le=1)] | None = None  # test accuracy, 0.8 for 80 %

    def __post_init__(self) -> None:
        if self.updates is self.versions is self.seconds is None:
            msgspec.structs.force_setattr(self, "updates", UPDATES_IF_ENDLESS)


class General(Struct, frozen=True, kw_only=True):
    """[experiment]"""

    name: Annotated[str, Meta(pattern=NAME)] = "fedge"  # begins the run folder's name
    seed: int = 0  # every random number is derived from it
    evaluate_updates: Count = 10  # accepted updates between two evaluations on the test set
    stop: Stop = Stop()


class Data(Struct, frozen=True, kw_only=True):
    """[data]"""

    dataset: str | Component = "fashion-mnist"  # a name, a path, or { kind = name, ... } with options of its source
    partition: Component = component("dual-dirichlet", clients=10)  # the training set as one shard per client


class Model(Struct, frozen=True, kw_only=True):
    """[model]"""

    factory: str = "fedge.client.models:mlp"  # "package.module:function" that returns the model


class Client(Struct, frozen=True, kw_only=True):
    """[client]"""

    trainer: str = "torch"  # or "package.module:function" that takes (experiment, dataset) and returns a Trainer
    batch_size: Count = 32  # examples per local step
    optimizer: Component = component("sgd", lr=0.05)  # of the local steps
    hooks: list[Component] = []  # terms in the loss or gradient, in this order


class Server(Struct, frozen=True, kw_only=True):
    """[server]"""

    scheduler: Component = component("compass")  # who trains, for how many steps, and what is aggregated together
    selector: Component | None = None  # who takes part in a round; only for schedulers that have rounds
    weigher: Component | None = None  # the share of an update in its group; left out: what fits the optimizer
    staleness: Component | None = None  # the discount on an old update; left out: what fits the scheduler
    aggregator: Component = component("mean")  # a group's rows to one vector
    optimizer: Component | None = None  # applies the aggregate; left out: what hooks, weigher and scheduler need


class Network(Struct, frozen=True, kw_only=True):
    """[simulation.network]"""

    bandwidth_bps: Positive | None = None  # bits per second, each way; left out: transfers take no time
    latency_s: NotNegative = 0.0  # one way, seconds
    up_s: Positive | None = None  # mean seconds between a client's outages; left out: it has none
    down_s: Positive | None = None  # mean seconds an outage lasts; goes with up_s
    drop_out: Share = 0.0  # the fraction of clients that leave for good
    drop_out_by_s: Positive = 600.0  # each at a time within so many seconds
    join_over_s: NotNegative = 0.0  # clients join at times within so many seconds


class Simulation(Struct, frozen=True, kw_only=True):
    """[simulation]"""

    speeds: Component = component("exponential")  # seconds per local step, by client
    jitter: NotNegative = 0.05  # relative spread of each task's duration
    processes: Annotated[int, Meta(ge=0, le=256)] = 0  # that train in parallel; 0 trains in this one
    network: Network = Network()
    attack: Component | None = None  # what some of the clients do: kind, clients = 1, faster = 1.0, and its settings


class Deploy(Struct, frozen=True, kw_only=True):
    """[deploy]"""

    listen: str = "127.0.0.1:7443"  # host:port of the coordinator
    limits: Limits = Limits()  # what one peer may cost the other


class Report(Struct, frozen=True, kw_only=True):
    """[report]"""

    to: list[str] = msgspec.field(default_factory=lambda: ["files"])  # beside the files: "tensorboard"


class Experiment(Struct, frozen=True, kw_only=True):
    """A whole experiment; every section and key may be left out."""

    experiment: General = General()
    data: Data = Data()
    model: Model = Model()
    client: Client = Client()
    server: Server = Server()
    simulation: Simulation = Simulation()
    deploy: Deploy = Deploy()
    report: Report = Report()


def load(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read a file; each override is "dotted.key=VALUE". Raises ExperimentError with one sentence."""
    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ExperimentError(f"There is no experiment file {str(path)!r}; `fedge init` writes one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ExperimentError(f"Cannot read {str(path)!r}: {error}.") from None
    return parse(text, overrides)


def parse(text: str, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in TOML text."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ExperimentError(f"The experiment file is not TOML: {error}.") from None
    for override in overrides:
        apply(data, override)
    return of(data)


def of(data: Mapping[str, Any]) -> Experiment:
    """The experiment in plain data, as TOML would give it."""
    _check_keys(data, Experiment, ())
    try:
        experiment = msgspec.convert(data, Experiment)
    except msgspec.ValidationError as error:
        raise ExperimentError(_sentence(error, data)) from None
    _check_values(experiment)
    return experiment


def apply(data: dict[str, Any], override: str) -> None:
    """Set one "dotted.key=VALUE" in plain data. VALUE is TOML; anything else is text.

    A component given another kind starts from that kind's own defaults, but for what KEPT names. Raises
    ExperimentError where the key or the tables on its way are no such thing.
    """
    path, equals, text = override.partition("=")
    *parents, key = path.strip().split(".")
    if not equals or not all((*parents, key)) or not parents:
        raise ExperimentError(f"--set {override!r}: write section.key=VALUE, as in experiment.seed=3.")
    table = data
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ExperimentError(f"--set {override!r}: {parent!r} is no table.")
    value = _toml_value(text.strip())
    if key == "kind":
        value = value if isinstance(value, str) else text.strip()  # nan is an attack
        if table.get("kind") != value:
            kept = {name: table[name] for name in _kept(".".join(parents), value) if name in table}
            table.clear()
            table |= kept
    table[key] = value


def _kept(where: str, kind: str) -> Sequence[str]:
    known = KEPT.get(where, ())
    return LESS.get(kind, known) if where == "server.aggregator" else known


def plain(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain data, without the keys that are None; `of` reads it back equal."""
    found: dict[str, Any] = _without_none(msgspec.to_builtins(experiment))
    return found


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def resolved(experiment: Experiment) -> str:
    """The experiment as TOML text with every default spelt out; `parse` reads it back equal."""
    return toml.dumps(plain(experiment))


def keys(struct: type[Any] = Experiment, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every key by its dotted path, with its default."""
    found: dict[str, Any] = {}
    default = struct()
    for name, kind in _fields(struct).items():
        if isinstance(kind, type) and (issubclass(kind, Struct) or kind is Limits):
            found |= keys(kind, (*path, name))
        else:
            found[".".join((*path, name))] = getattr(default, name)
    return found


def _fields(struct: type[Any]) -> dict[str, Any]:
    return get_type_hints(struct)


def _check_keys(data: Mapping[str, Any], struct: type[Any], path: tuple[str, ...]) -> None:
    fields = _fields(struct)
    for key, value in data.items():
        if key not in fields:
            where = f"[{'.'.join(path)}] has no key" if path else "The experiment file has no section"
            raise ExperimentError(f"{where} {key!r}; {nearest(key, fields)}")
        kind = fields[key]
        if isinstance(kind, type) and (issubclass(kind, Struct) or kind is Limits) and isinstance(value, Mapping):
            _check_keys(value, kind, (*path, key))
        _check_finite(value, (*path, key))


def _check_finite(value: Any, path: tuple[str, ...]) -> None:
    if isinstance(value, float) and not math.isfinite(value) and path[-1] == "kind":
        raise ExperimentError(f'{".".join(path)}: a kind is text; write "{value}", in quotes.')
    if isinstance(value, float) and not math.isfinite(value):
        raise ExperimentError(f"{'.'.join(path)} must be finite, not {value}.")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, (*path, key))


def _check_values(experiment: Experiment) -> None:
    for tracker in experiment.report.to:
        if tracker not in TRACKERS:
            raise ExperimentError(f"report.to: no tracker {tracker!r}; {nearest(tracker, TRACKERS)}")
    for name in _fields(Limits):
        value = getattr(experiment.deploy.limits, name)
        if value <= 0:
            raise ExperimentError(f"deploy.limits.{name} is {value}; a limit must be above 0.")
    network = experiment.simulation.network
    if (network.up_s is None) != (network.down_s is None):
        raise ExperimentError("simulation.network: outages need both up_s and down_s; give both or neither.")


def _sentence(error: msgspec.ValidationError, data: Mapping[str, Any]) -> str:
    """What is wrong, as "a.b: expected ..."; where a component's kind stands alone, how to write it."""
    path, what = explained(error)
    what = what.replace(f"text matching regex {NAME!r}", NAME_IN_WORDS)
    section, _, key = path.partition(".")
    if what == "expected a table, got text" and _fields(_fields(Experiment)[section]).get(key) in COMPONENTS:
        what += f"; write {key} = {{ kind = {json.dumps(data[section][key], ensure_ascii=False)} }}"
    return f"{path}: {what}." if path else f"{what[0].upper()}{what[1:]}."


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
