"""The coordinator and its devices, from an experiment file: what `fedge serve`, `join` and `status` do.

Owns which data a device trains on, and the law that the coordinator never chooses code or files on a device: an
experiment that comes over the wire may name built-in components and the embedded data set only. Must never speak the
protocol itself.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedge import build, hostile, trackers
from fedge import experiment as experiments
from fedge.client.connection import Connection, channel_options
from fedge.client.data import load
from fedge.client.runtime import Progress, Summary, run_client
from fedge.client.trainer import Shard, Trainer
from fedge.core import addresses
from fedge.core.errors import AddressError, ExperimentError
from fedge.core.limits import Limits
from fedge.experiment import Experiment
from fedge.protos import fedge_pb2 as pb
from fedge.protos.fedge_pb2_grpc import CoordinatorStub
from fedge.runs import Recorder, Run, Watcher
from fedge.server.coordinator.serving import check_free, serve
from fedge.server.machine.events import Record
from fedge.simulation.engine import Meter

OPEN_DATA = "fashion-mnist"  # the one data set a coordinator may name
OPEN_MODELS = "fedge.client.models:"  # the factories it may name


def coordinate(
    experiment: Experiment,
    folder: Path,
    *,
    listen: str,
    allow_remote: bool,
    on_listening: Callable[[str], None],
    watchers: Sequence[Watcher] = (),
) -> Run:
    """Coordinate one settled experiment until it ends, with its run folder and its journal (FOLDER/state) in `folder`.

    Started again on the same folder, it goes on where it was. Raises leaves of FedgeError.
    """
    addresses.check_listen(listen, allow_remote)
    check_free(listen)  # before there is a folder that would be left behind
    dataset = load(experiment.data.dataset)
    build.check_target(experiment, dataset)
    trainer = build.trainer(experiment, dataset)
    clients = build.expected(experiment) or len(build.shards(experiment, dataset))
    plan = build.federation(experiment, trainer.layout, clients)
    folder.mkdir(parents=True, exist_ok=True)
    watching, remarks = trackers.opened(experiment, folder), hostile.remarks(experiment)
    with watching as more, Recorder(experiment, folder, [*more, *watchers], remarks) as recorder:
        line = Liner(recorder, trainer.layout.size * np.dtype(np.float32).itemsize)
        work = serve(
            plan,
            trainer.initial(),
            listen=listen,
            state_dir=folder / "state",
            on_record=line.record,
            evaluate=trainer.evaluate if build.measurable(experiment, dataset) else None,
            recorded=recorder.recorded,
            experiment_text=experiments.resolved(experiment),
            on_listening=on_listening,
            allow_remote=allow_remote,
        )
        machine = asyncio.run(work)
        return recorder.finish({}, trainer.layout, machine.broadcast.vector, machine.finished or "stopped")


class Liner:
    """Makes the lines of metrics.jsonl out of the records of a coordinator, and has both taken down."""

    def __init__(self, recorder: Recorder, model_bytes: int) -> None:
        self._recorder, self._model_bytes = recorder, model_bytes
        self._meter = Meter()
        self._meter.bytes_up = recorder.tally.bytes_up
        self._meter.bytes_down = recorder.tally.counts["dispatched"] * model_bytes

    def record(self, record: Record) -> None:
        """Pass a record on, and a line of metrics after each evaluation."""
        self._meter.record(record)
        if record.kind == "dispatched":
            self._meter.bytes_down += self._model_bytes
        self._recorder.record(record)
        if record.kind == "evaluated":
            known = {"t": record.t, "wall_s": self._recorder.wall_s, "updates": self._recorder.tally.updates}
            self._recorder.metrics({**known, **record.values, **self._meter.take()})


def participate(
    address: str,
    experiment: Experiment | None,
    *,
    name: str,
    shard: int | None,
    folder: Path | None,
    progress: Progress | None,
) -> Summary:
    """Be a device until the run ends. Without an experiment of its own it takes the coordinator's, within limits.

    `shard` is the part of the partition to train on; None: the whole data set. `progress` as for run_client. Raises
    leaves of FedgeError.
    """
    if experiment is not None:
        plan, (trainer, indices) = experiment, prepared(experiment, shard)
    else:
        with membership(address, name) as text:
            plan = offered(text)
            trainer, indices = prepared(plan, shard)
    return run_client(address, name, trainer, indices, folder=folder, limits=plan.deploy.limits, progress=progress)


def prepared(plan: Experiment, shard: int | None) -> tuple[Trainer, Shard]:
    """The trainer of a device, and what of the data it trains on."""
    dataset = load(plan.data.dataset)
    trainer = build.trainer(plan, dataset)
    if shard is None:
        return trainer, np.arange(len(dataset.y_train), dtype=np.int64)
    parts = build.shards(plan, dataset)
    if not 0 <= shard < len(parts):
        raise ExperimentError(f"--shard {shard}: the partition has shards 0 to {len(parts) - 1}.")
    return trainer, parts[shard]


@contextmanager
def membership(address: str, name: str) -> Iterator[str]:
    """The text of the coordinator's experiment, before one is a client of it. A coordinator that takes who asks for one
    already is told where it cannot go on from there.
    """
    connection = Connection(address, name, Limits())
    try:
        text = str(connection.join().experiment)
        try:
            yield text
        except BaseException:
            connection.leave()
            raise
    finally:
        connection.close()


def offered(text: str) -> Experiment:
    """The coordinator's experiment, settled. Raises ExperimentError where it names code or files of this device."""
    if not text:
        raise ExperimentError("The coordinator sends no experiment; name the experiment file after its address.")
    found = experiments.parse(text)
    check_offered(found)
    return build.settled(found)


def check_offered(experiment: Experiment) -> None:
    """Code and files are never chosen by the wire. Raises ExperimentError with what to do instead."""
    dataset = experiment.data.dataset
    if dataset not in (OPEN_DATA, {"kind": OPEN_DATA}):
        raise ExperimentError(
            f"The coordinator's experiment names the data set {dataset!r}, and a coordinator may choose neither files "
            "nor code here; name your own experiment file after the address."
        )
    for path in dotted(experiments.plain(experiment)):
        if not path.startswith(OPEN_MODELS):
            raise ExperimentError(
                f"The coordinator's experiment names the code {path!r}, and a coordinator may not choose code here; "
                "name your own experiment file after the address."
            )


def dotted(value: Any, key: str = "") -> Iterator[str]:
    """Every dotted path to code in plain data."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from dotted(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from dotted(item, key)
    elif isinstance(value, str) and ":" in value and key != "listen":
        yield value


def status(address: str) -> dict[str, Any]:
    """How the run at "host:port" stands, as plain data. Raises AddressError where nobody answers."""
    limits = Limits()
    addresses.parse(address)
    with grpc.insecure_channel(address, channel_options(limits)) as channel:
        stub: Any = CoordinatorStub(channel)  # type: ignore[no-untyped-call]
        try:
            reply = stub.Status(pb.StatusRequest(), timeout=limits.rpc_timeout_s)
        except grpc.RpcError as error:
            why = str(error.code().name).lower().replace("_", " ")
            raise AddressError(f"No answer from {address} ({why}); is the coordinator up?") from None
    return {
        "run_id": reply.run_id,
        "version": reply.version,
        "updates": reply.updates,
        "running_s": reply.running_s,
        "finished": reply.finished,
        "metrics": dict(reply.metrics),
        "clients": [
            {"client": one.client, "state": one.state, "updates": one.updates, "refused": one.refused}
            for one in sorted(reply.clients, key=lambda one: str(one.client))
        ],
    }
