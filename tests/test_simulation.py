"""Virtual time: the same seed gives the same bytes, outages and drop-outs are survived, one process equals several."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.client.trainer import FunctionTrainer
from fedge.core.errors import DataError, ExperimentError
from fedge.server.machine import Stop
from fedge.simulation import SPEEDS, Network, Simulation
from fedge.simulation.network import Line
from fedge.strategies.schedulers import SCHEDULERS
from tests.machines import federation

SHARDS = [np.arange(start, start + 10) for start in range(0, 60, 10)]


def pull(vector, task, shard):
    """Each client pulls the model towards the mean of its shard."""
    return vector + np.float32(0.01) * task.steps * (np.float32(shard.mean()) - vector) / 10


def trainer_from(settings):
    """What a worker builds."""
    return FunctionTrainer(np.zeros(settings["size"]), pull)


def simulation(kind="compass", network=Network(), processes=0, speeds="exponential", seed=3, **stop):
    trainer = trainer_from({"size": 5})
    stop = stop or {"updates": 60}
    scheduler = SCHEDULERS.build({"kind": kind})
    plan = federation(layout=trainer.layout, scheduler=scheduler, expected=6, seed=seed, stop=Stop(**stop))
    spec = ("tests.test_simulation:trainer_from", {"size": 5})
    return Simulation(
        plan, trainer, SHARDS, SPEEDS.build({"kind": speeds}), network, processes=processes, worker_spec=spec
    )


def test_the_same_seed_gives_the_same_bytes_and_another_does_not():
    first, again, other = (simulation(seed=seed).run() for seed in (3, 3, 4))
    assert first.hash == again.hash
    assert first.now == again.now
    assert first.hash != other.hash


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compass", "fedavg", "fedasync"])
def test_one_process_and_two_give_the_same_bytes(kind):
    one, two = simulation(kind).run(), simulation(kind, processes=2).run()
    assert (one.hash, one.now, one.updates) == (two.hash, two.now, two.updates)


def test_virtual_time_is_that_of_the_slowest_in_a_round():
    """One synchronous round of 100 steps: as long as the slowest client takes, but no wall time to speak of."""
    run = simulation("fedavg", versions=1)
    run._jitter = 0.0
    slowest = max(run._speeds.step_s(index, 0, 3) for index in range(6))
    assert run.run().now == pytest.approx(100 * slowest)


def test_outages_and_drop_outs_do_not_stop_the_run():
    rough = Network(
        bandwidth_bps=1e6, latency_s=0.05, up_s=60, down_s=45, drop_out=0.34, drop_out_by_s=200, join_over_s=20
    )
    records = []
    result = simulation("compass", rough, updates=150).run(records.append)
    kinds = {record.kind for record in records}
    assert result.finished == "updates"
    assert {"left", "joined", "aggregated"} <= kinds


def test_everybody_gone_ends_the_run_as_idle():
    result = simulation("fedasync", Network(drop_out=1.0, drop_out_by_s=50), updates=10_000).run()
    assert result.finished == "idle"


def test_transfers_take_their_time():
    quick, slow = (
        simulation("fedavg", versions=3).run(),
        simulation("fedavg", Network(bandwidth_bps=8.0), versions=3).run(),
    )
    assert slow.now - quick.now == pytest.approx(3 * 2 * 20)  # 20 bytes at 1 byte/s, down and up, three rounds


def test_a_trainer_that_raises_fails_its_task_and_the_client_is_evicted_in_the_end():
    def moody(vector, task, shard):
        if shard[0] == 0:
            raise RuntimeError("out of memory")
        return pull(vector, task, shard)

    run = simulation("fedasync", updates=40)
    run._trainer = FunctionTrainer(np.zeros(5), moody)
    records = []
    assert run.run(records.append).finished == "updates"
    failed = [record for record in records if record.kind == "failed"]
    assert len(failed) == 3
    assert "client-000" in failed[0].values["reason"]
    assert "out of memory" in failed[0].values["reason"]
    assert [record.values["client"] for record in records if record.kind == "evicted"] == ["client-000"]


@given(st.floats(0, 500), st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_a_line_never_goes_back_and_never_beats_its_bandwidth(start, sizes):
    network = Network(bandwidth_bps=8_000, up_s=20, down_s=10)
    line, now = Line(network, 0, 1), start
    for size in sizes:
        done = line.transfer(now, size)
        assert done >= now + size / 1000 - 1e-6
        now = done


def test_recorded_times_are_repeated(tmp_path):
    file = tmp_path / "times.json"
    file.write_text(json.dumps([[0.1, 0.2], [0.5]]))
    times = SPEEDS.build({"kind": "trace", "file": str(file)})
    assert [times.step_s(0, task, 0) for task in range(3)] == [0.1, 0.2, 0.1]
    assert times.step_s(3, 7, 0) == 0.5


@pytest.mark.parametrize("text", ["{}", "[[0.1], []]", "[[-1]]", "not json"])
def test_a_bad_trace_is_named(tmp_path, text):
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(DataError, match="times.json"):
        SPEEDS.build({"kind": "trace", "file": str(file)}).step_s(0, 0, 0)
    with pytest.raises(DataError, match="cannot read"):
        SPEEDS.build({"kind": "trace", "file": "absent.json"}).step_s(0, 0, 0)


def test_a_step_takes_time():
    with pytest.raises(ExperimentError, match="above 0"):
        SPEEDS.build({"kind": "exponential", "mean_s": 0.0})


class Odd:
    """A trainer that breaks its contract in one way."""

    def __init__(self, way):
        self.way, self._plain = way, FunctionTrainer(np.zeros(5), pull)
        self.layout, self.initial, self.evaluate = self._plain.layout, self._plain.initial, self._plain.evaluate

    def train(self, task, broadcast, shard, state, out):
        update = self._plain.train(task, broadcast, shard, state, out)
        return self.way(update)


WAYS = {
    "not an Update": lambda update: None,
    "for task": lambda update: replace(update, task_id="0" * 32),
    "should be float32": lambda update: replace(update, blobs={"delta": np.zeros(4, np.float32)}),
    "raised KeyError": lambda update: {}["loss"],
}


@pytest.mark.parametrize("says", WAYS)
def test_a_trainer_that_breaks_its_contract_fails_its_tasks_and_is_named(says):
    run, records = simulation("fedasync", updates=40), []
    run._trainer = Odd(WAYS[says])
    before = run._machine.broadcast.vector.copy()
    assert run.run(records.append).finished == "idle"  # everybody has been evicted
    failed = [record.values["reason"] for record in records if record.kind == "failed"]
    assert failed
    assert all(says in reason and "client-" in reason for reason in failed)
    np.testing.assert_array_equal(run._machine.broadcast.vector, before)
