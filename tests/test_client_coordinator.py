"""The client runtime and the coordinator as they ship, over real sockets and a real journal."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from fedge.client.runtime import run_client
from fedge.client.session import Session
from fedge.client.spool import Spool
from fedge.client.trainer import FunctionTrainer
from fedge.core.errors import WrongManifest
from fedge.core.limits import Limits
from fedge.core.params import Layout
from fedge.core.task import Update
from fedge.server.coordinator import serve
from fedge.server.machine import Federation, Stop
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.optimizers.sgd import Sgd
from fedge.strategies.schedulers.fedavg import FedAvg
from fedge.strategies.weighers.equal import Equal
from fedge.strategies.weighers.staleness import Constant

SIZE = 3000
SHARD = np.arange(5)
LIMITS = Limits(chunk_bytes=1000, max_reconnect_s=0.2, liveness_s=10.0, lease_s=30.0, stream_timeout_s=20.0)


def trainer(step=lambda weights, task, shard: weights + 1):
    return FunctionTrainer(np.zeros(SIZE), step)


@contextmanager
def serving(folder, clients, updates, address="127.0.0.1:0"):
    """The coordinator in a thread; gives (address, records, the final machine once the run has ended)."""
    layout = Layout.of({"parameters": np.zeros(SIZE)})
    parts = (FedAvg(steps=3), Equal(), Constant(), Mean(), Sgd())
    plan = Federation(layout, *parts, expected=clients, limits=LIMITS, stop=Stop(updates=updates))
    up, addresses, records, ended = threading.Event(), [], [], []

    async def main():
        ended.append(
            await serve(
                plan,
                np.zeros(SIZE, np.float32),
                listen=address,
                state_dir=folder,
                on_record=records.append,
                on_listening=lambda at: (addresses.append(at), up.set()),
            )
        )

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert up.wait(20)
    yield addresses[0], records, ended
    thread.join(30)
    assert not thread.is_alive()


def test_clients_and_coordinator_finish_a_run_together(tmp_path):
    summaries = []
    with serving(tmp_path, 2, 8) as (address, records, ended):

        def client(name):
            summaries.append(run_client(address, name, trainer(), SHARD, limits=LIMITS))

        threads = [threading.Thread(target=client, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert [summary.finished for summary in summaries] == ["updates"] * 2
    assert sum(summary.updates for summary in summaries) == 8
    assert ended[0].updates == 8
    np.testing.assert_allclose(ended[0].broadcast.vector, np.full(SIZE, 4.0), rtol=1e-6)
    arrived = [record.values for record in records if record.kind == "arrived"]
    assert all(set(values["timings"]) == {"download_s", "compute_s", "upload_s"} for values in arrived)


def test_a_client_that_died_with_a_finished_update_delivers_it_as_another_process(tmp_path):
    with serving(tmp_path / "coordinator", 1, 2) as (address, records, ended):
        session = Session(address, "a", examples=5, limits=LIMITS)
        task, broadcast = session.receive()
        update = Update("a", task.id, task.version, task.steps, 5, {"delta": broadcast.vector - 7})
        Spool(tmp_path / "a", "a", session.run_id).keep(update, {})
        session._connection.close()  # gone without a word
        summary = run_client(address, "a", trainer(), SHARD, folder=tmp_path / "a", limits=LIMITS)
    assert (summary.updates, summary.refused) == (2, 0)
    assert next(record.values["task"] for record in records if record.kind == "arrived") == task.id
    np.testing.assert_allclose(ended[0].broadcast.vector, np.full(SIZE, 8.0), rtol=1e-6)


def test_a_large_update_of_the_wrong_shape_is_refused_with_its_reason_and_the_run_goes_on(tmp_path):
    with (
        serving(tmp_path / "coordinator", 1, 1) as (address, records, ended),
        Session(address, "a", examples=5, limits=LIMITS) as session,
    ):
        task, broadcast = session.receive()
        wrong = Update("a", task.id, task.version, task.steps, 5, {"delta": np.zeros(4 << 20, np.float32)})
        with pytest.raises(WrongManifest, match=rf"must be float32 \({SIZE},\)"):
            session.send(wrong)
        task, broadcast = session.receive()
        session.send(Update("a", task.id, task.version, task.steps, 5, {"delta": broadcast.vector - 7}))
        assert session.receive() is None
    assert [record.values["reason"] for record in records if record.kind == "failed"] == ["WRONG_MANIFEST"]
    np.testing.assert_allclose(ended[0].broadcast.vector, np.full(SIZE, 7.0), rtol=1e-6)


def test_a_trainer_that_fails_once_is_given_another_task(tmp_path):
    failing = iter([True])

    def step(weights, task, shard):
        if next(failing, False):
            raise ValueError("a bad batch")
        return weights + 1

    with serving(tmp_path, 1, 2) as (address, records, ended):
        summary = run_client(address, "a", trainer(step), SHARD, limits=LIMITS)
    assert (summary.updates, summary.failed) == (2, 1)
    [failed] = [record.values for record in records if record.kind == "failed"]
    assert "a bad batch" in failed["reason"]
    assert ended[0].updates == 2
