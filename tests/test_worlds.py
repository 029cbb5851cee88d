"""One machine, two worlds: a simulated FedCompass run, driven again through gRPC on a fake clock, is the same run."""

import asyncio

import numpy as np
import pytest

from fedge.client.trainer import FunctionTrainer
from fedge.core.random import generator
from fedge.core.task import DELTA
from fedge.protos import wire
from fedge.server.coordinator.replay import replay
from fedge.server.machine import Machine, Stop
from fedge.server.machine.events import Arrived, Event, Joined, Record, Ticked
from fedge.simulation import SPEEDS, Simulation
from fedge.strategies import aggregators
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.weighers.staleness import Polynomial
from tests.coordinator_fixture import Peer, plan, room

CLIENTS = 5
SIZE = 20_000  # more than one block of the Gram products
RULES = {
    "mean": {"kind": "mean"},
    "gram": {"kind": "multi-krum", "byzantine": 1, "pre": ["nnm"]},
    "coordinate": {"kind": "trimmed-mean", "byzantine": 1, "pre": ["nnm"]},
    "remembering": {"kind": "trimmed-mean", "byzantine": 1, "cache": True, "momentum": 0.5},
}


class FakeClock:
    """Says what it was told."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


def simulate(federation) -> tuple[list[Event], list[Record], bytes]:
    """The events that a simulated run fed to its machine, the record they made, and the model at the end."""

    def pull(vector, task, shard):
        return vector * np.float32(0.9) + pattern * np.float32(shard[0] + task.steps / 100)

    pattern = generator(0, "pattern").standard_normal(SIZE, np.float32)
    trainer = FunctionTrainer(np.linspace(-1, 1, SIZE), pull)
    shards = [np.arange(index, index + 3) for index in range(CLIENTS)]
    simulation = Simulation(federation, trainer, shards, SPEEDS.build({"kind": "exponential"}))
    events, records, handle = [], [], simulation._machine.handle

    def spy(event: Event):
        if isinstance(event, Arrived):  # the delta lies in a buffer that the next client overwrites
            blobs = {DELTA: event.update.delta.copy()}
            event = Arrived(event.now, type(event.update)(**{**fields_of(event.update), "blobs": blobs}))
        events.append(event)
        return handle(event)

    simulation._machine.handle = spy
    result = simulation.run(records.append)
    assert result.updates >= 60
    return events, records, result.vector.tobytes()


def fields_of(update):
    return {name: getattr(update, name) for name in type(update).__slots__}


@pytest.fixture(params=RULES)
def federation(request):
    compass = SCHEDULERS.build({"kind": "compass", "latest_factor": 1.02})  # tight: some come late
    rule = aggregators.build(RULES[request.param])
    return plan(
        clients=CLIENTS, size=SIZE, scheduler=compass, staleness=Polynomial(), aggregator=rule, stop=Stop(updates=60)
    )


async def through_grpc(federation, events: list[Event], state_dir) -> tuple[list[Record], bytes]:
    """The same events as calls to a coordinator whose clock shows their times."""
    async with room(state_dir, federation) as made:
        clock = made.coordinator._clock = FakeClock()
        peers: dict[str, Peer] = {}
        for event in events:
            clock.time = event.now
            match event:
                case Joined(_, client, examples, layout):
                    peers[client] = made.peer(client)
                    await peers[client].join(examples=examples, layout_hash=layout)
                case Arrived(_, update):
                    peer = peers[update.client]
                    begin = wire.begin_of(update, peer.sender, wire.encode_blobs(update.blobs)[0])
                    await peer.send(peer.parts(begin, update.delta.tobytes()))
                case Ticked():
                    made.coordinator._rewake.set()
                    while await made.coordinator.ask(lambda machine: machine.now) < event.now:
                        await asyncio.sleep(0.001)
        vector = (await made.coordinator.ask(lambda machine: machine.broadcast)).vector
        return made.lines, vector.tobytes()


def told(records: list[Record]) -> list[tuple[float, str, dict]]:
    return [(record.t, record.kind, dict(record.values)) for record in records]


def test_a_simulated_run_through_grpc_has_the_same_effects_and_the_same_model(federation, tmp_path):
    events, records, model = simulate(federation)
    assert any(record.kind == "arrived" and record.values["late"] for record in records)
    assert any(isinstance(event, Ticked) for event in events)
    lines, served = asyncio.run(through_grpc(federation, events, tmp_path))
    assert told(lines) == told(records)
    assert served == model
    assert replay(tmp_path, federation).broadcast.vector.tobytes() == model


def test_the_events_alone_make_the_run(federation):
    events, records, model = simulate(federation)
    initial = FunctionTrainer(np.linspace(-1, 1, SIZE), lambda *_: None).initial()
    machine = Machine(federation, initial)
    again = [effect for event in events for effect in machine.handle(event) if isinstance(effect, Record)]
    assert told(again) == told(records)
    assert machine.broadcast.vector.tobytes() == model
