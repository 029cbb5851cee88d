"""The client against a coordinator that cuts, forgets, refuses and restarts: nothing finished is lost."""

import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import grpc
import numpy as np
import pytest

from fedge.client.connection import Connection
from fedge.client.runtime import run_client
from fedge.client.session import Session
from fedge.client.spool import Spool
from fedge.client.trainer import FunctionTrainer
from fedge.core.errors import (
    AddressError,
    DataError,
    ModelError,
    NotJoined,
    RefusedClient,
    StaleIncarnation,
    TaskSpent,
    TooStale,
    TrainerError,
)
from fedge.core.limits import Limits
from fedge.core.task import Update
from tests.fake_coordinator import FakeCoordinator

SIZE = 3000
SHARD = np.arange(5)
CUT = grpc.StatusCode.UNAVAILABLE
QUICK = Limits(max_reconnect_s=0.2, liveness_s=0.5, lease_s=20.0, rpc_timeout_s=5.0)


def trainer(step=None):
    """Each task moves each weight by a different amount, so that a byte out of place is seen."""
    return FunctionTrainer(np.zeros(SIZE), step or (lambda weights, task, shard: weights + np.arange(SIZE)))


def run(coordinator, **kwargs):
    kwargs = {"trainer": trainer(), "limits": QUICK, **kwargs}
    return run_client(coordinator.address, "site-1", kwargs.pop("trainer"), SHARD, **kwargs)


@pytest.fixture
def coordinator():
    with FakeCoordinator(np.zeros(SIZE), tasks=2) as fake:
        yield fake


def reached(coordinator, tasks=2):
    """The model after each task was counted exactly once."""
    model = coordinator.broadcasts[-1]
    return model.version == tasks and np.array_equal(model.vector, tasks * np.arange(SIZE, dtype=np.float32))


# ---- the plain way -----------------------------------------------------------------------------


def test_a_client_trains_until_the_run_is_finished(coordinator):
    heard = []
    summary = run(coordinator, progress=lambda kind, details: heard.append((kind, details["task"])))
    assert reached(coordinator)
    assert heard == [
        ("received", "site-1-0"),
        ("sent", "site-1-0"),
        ("received", "site-1-1"),
        ("sent", "site-1-1"),
    ]
    assert (summary.run_id, summary.finished) == ("run-1", "updates")
    assert (summary.updates, summary.refused, summary.failed, summary.repeated) == (2, 0, 0, 0)
    assert summary.version == 1
    assert summary.bytes_up == summary.bytes_down == 2 * 4 * SIZE
    assert coordinator.joins[0].examples == len(SHARD)


def test_updates_carry_the_task_and_measured_times(coordinator):
    run(coordinator)
    update = coordinator.updates["site-1-1"]
    assert (update.client, update.base_version, update.steps, update.examples) == ("site-1", 1, 4, 5)
    assert set(update.timings) == {"download_s", "compute_s", "upload_s"}
    assert all(seconds > 0 for seconds in update.timings.values())
    assert coordinator.updates["site-1-0"].timings["upload_s"] == 0  # there was none before


def test_a_version_already_here_is_not_fetched_again(coordinator):
    with Session(coordinator.address, "site-1", examples=1, limits=QUICK) as session:
        task, broadcast = session.receive()
        session.fail(task, "for the sake of it")
        again, same = session.receive()
        assert (again.id, again.version) == ("site-1-1", task.version)
        assert same is broadcast
        session.fail(again, "again")
        assert session.receive() is None
    assert coordinator.calls["Download"] == 1
    assert coordinator.failures == [("site-1-0", "for the sake of it"), ("site-1-1", "again")]


def test_many_clients_in_threads_of_one_process():
    with FakeCoordinator(np.zeros(8), tasks=2) as coordinator:
        plain = FunctionTrainer(np.zeros(8), lambda weights, task, shard: weights + 1)
        done = []

        def client(name):
            done.append(run_client(coordinator.address, name, plain, SHARD, limits=QUICK))

        threads = [threading.Thread(target=client, args=(f"c{i}",)) for i in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert [summary.updates for summary in done] == [2] * 5
        np.testing.assert_array_equal(coordinator.broadcasts[-1].vector, np.full(8, 10))


# ---- cuts --------------------------------------------------------------------------------------


def test_an_upload_cut_midway_goes_on_by_offset_and_arrives_to_the_byte(coordinator):
    coordinator.faults["Upload"] = [5000, 11000]
    run(coordinator)
    assert coordinator.offsets == [0, 5000, 11000, 0]
    assert coordinator.raw["site-1-0"] == (0 - np.arange(SIZE, dtype="<f4")).tobytes()
    assert reached(coordinator)


def test_a_download_cut_midway_goes_on_by_offset(coordinator):
    coordinator.faults["Download"] = [4000, 9000]
    summary = run(coordinator)
    assert reached(coordinator)
    assert summary.bytes_down == 2 * 4 * SIZE  # no byte came twice
    assert coordinator.calls["Download"] == 4


def test_a_lost_answer_is_no_second_update(coordinator):
    coordinator.faults["Ack"] = [CUT]
    summary = run(coordinator)
    assert reached(coordinator)
    assert (summary.updates, summary.repeated) == (2, 1)


@pytest.mark.parametrize("method", ["Join", "Tasks", "Download", "Upload", "UploadOffset", "Fail"])
def test_an_unavailable_call_is_tried_again(coordinator, method):
    coordinator.faults[method] = [CUT, grpc.StatusCode.DEADLINE_EXCEEDED, CUT]
    if method == "UploadOffset":
        coordinator.faults["Upload"] = [5000]
    raised = iter([True])

    def step(weights, task, shard):
        if method == "Fail" and next(raised, False):
            raise ValueError("a bad batch")
        return weights + np.arange(SIZE)

    summary = run(coordinator, trainer=trainer(step))
    assert not coordinator.faults[method]
    assert reached(coordinator, tasks=1 if method == "Fail" else 2)
    assert summary.failed == (method == "Fail")


def test_after_a_cut_the_client_joins_again_as_the_same_incarnation(coordinator):
    coordinator.faults["Upload"] = [5000]
    run(coordinator)
    assert len(coordinator.joins) > 1
    assert len({request.sender.incarnation for request in coordinator.joins}) == 1


def test_garbled_bytes_are_sent_and_fetched_again_from_the_start(coordinator):
    coordinator.faults["Upload"] = ["garble"]
    run(coordinator)
    assert coordinator.offsets == [0, 0, 0]
    assert reached(coordinator)


def test_a_download_that_stays_garbled_gives_the_task_back():
    with FakeCoordinator(np.ones(SIZE), tasks=1) as coordinator:
        coordinator.faults["Download"] = ["garble"] * 3
        summary = run(coordinator)
        assert summary.updates == 0
        [(task, why)] = coordinator.failures
        assert task == "site-1-0"
        assert "SHA-256" in why


def test_a_restarted_coordinator_finds_its_clients_again(coordinator):
    training, go_on = threading.Event(), threading.Event()

    def step(weights, task, shard):
        training.set()
        assert go_on.wait(20)
        return weights + np.arange(SIZE)

    summaries = []
    client = threading.Thread(target=lambda: summaries.append(run(coordinator, trainer=trainer(step))))
    client.start()
    assert training.wait(20)
    coordinator.stop()
    coordinator._incarnations.clear()  # it forgets who was connected, not what it issued
    coordinator.calls.clear()
    coordinator.start()
    coordinator.wait_for(lambda: coordinator.holding.get("site-1") and coordinator.calls["Tasks"])
    assert coordinator.holding["site-1"] == "site-1-0"  # so that it is not sent again
    go_on.set()
    client.join(30)
    assert reached(coordinator)
    assert summaries[0].updates == 2


def test_a_call_before_the_client_has_joined_again_is_tried_again(coordinator):
    coordinator.faults["Upload"] = [NotJoined("Join first.")]
    assert run(coordinator).updates == 2
    assert len(coordinator.joins) > 1


def test_another_run_at_the_same_address_is_not_joined_unasked(coordinator):
    def step(weights, task, shard):
        coordinator.run_id = "run-2"
        return weights

    coordinator.faults["Upload"] = [5000]
    with pytest.raises(RefusedClient, match="another federation"):
        run(coordinator, trainer=trainer(step))


def test_a_run_that_ends_while_a_client_trains_lets_it_go(coordinator):
    def step(weights, task, shard):
        with coordinator._news:
            coordinator.tasks_each = 0
            coordinator._news.notify_all()
        coordinator.wait_for(lambda: coordinator.told)
        coordinator.stop()
        return weights

    summary = run(coordinator, trainer=trainer(step))
    assert summary.finished == "updates"
    assert (summary.updates, summary.refused) == (0, 0)  # that nothing more counts is no fault of it


class Proxy:
    """Passes bytes on, until `deaf`: from then on, what lives is acknowledged by TCP and goes nowhere."""

    def __init__(self, port):
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends = []
        self._passing = []
        threading.Thread(target=self._accept, daemon=True).start()

    def go_deaf(self):
        for passing in self._passing:
            passing.clear()

    def close(self):
        for end in (self._listener, *self._ends):
            end.close()

    def _accept(self):
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            passing = threading.Event()
            passing.set()
            self._passing.append(passing)
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink, passing), daemon=True).start()

    @staticmethod
    def _pass(source, sink, passing):
        try:
            while data := source.recv(1 << 16):
                if passing.is_set():
                    sink.sendall(data)
        except OSError:
            pass


def test_a_peer_gone_silent_behind_a_proxy_is_found_and_the_client_comes_back(coordinator):
    proxy = Proxy(coordinator.port)
    limits = Limits(keepalive_time_s=1.0, keepalive_timeout_s=1.0, max_reconnect_s=0.2)

    def step(weights, task, shard):
        if task.id == "site-1-0":
            proxy.go_deaf()
        return weights + np.arange(SIZE)

    try:
        summary = run_client(proxy.address, "site-1", trainer(step), SHARD, limits=limits)
    finally:
        proxy.close()
    assert summary.updates == 2
    assert len(coordinator.joins) > 1
    assert reached(coordinator)


# ---- refusals ----------------------------------------------------------------------------------


def test_a_spent_task_counts_as_refused_where_the_run_goes_on(coordinator):
    coordinator.faults["Upload"] = [TaskSpent("This task has ended; fetch a new one.")]

    def step(weights, task, shard):
        with coordinator._news:
            coordinator._done["site-1"] += task.id == "site-1-0"
        return weights + np.arange(SIZE)

    heard = []
    summary = run(coordinator, trainer=trainer(step), progress=lambda kind, details: heard.append(kind))
    assert (summary.updates, summary.refused) == (1, 1)
    assert heard.count("refused") == 1


def test_an_update_after_the_end_of_the_run_is_no_fault(coordinator, caplog):
    coordinator.faults["Upload"] = [TaskSpent("The run is over; nothing more counts.")]

    def step(weights, task, shard):
        with coordinator._news:
            coordinator.tasks_each = 0
            coordinator._news.notify_all()
        return weights

    summary = run(coordinator, trainer=trainer(step))
    assert (summary.finished, summary.updates, summary.refused) == ("updates", 0, 0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("listening", [True, False])
def test_a_failure_is_told_once(coordinator, caplog, listening):
    failures = iter([True])

    def step(weights, task, shard):
        if next(failures, False):
            raise ValueError("a bad batch")
        return weights

    heard = []
    progress = (lambda kind, details: heard.append(details.get("detail", ""))) if listening else None
    run(coordinator, trainer=trainer(step), progress=progress)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    told = [sentence for sentence in (*heard, *warned) if "a bad batch" in sentence]
    assert len(told) == 1


def test_who_cannot_use_its_folder_leaves(coordinator, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError):
        run(coordinator, folder=tmp_path / "file")
    assert coordinator.left == ["site-1"]


def test_a_refused_update_is_counted_and_the_client_goes_on(coordinator):
    coordinator.faults["Upload"] = [TooStale("Three versions late.")]
    heard = []

    def progress(kind, details):
        heard.append((kind, details.get("reason")))
        if kind == "refused":
            with coordinator._news:
                coordinator._done["site-1"] += 1  # the coordinator goes on to the next task
                coordinator._news.notify_all()

    summary = run(coordinator, progress=progress)
    assert (summary.updates, summary.refused) == (1, 1)
    assert ("refused", "TOO_STALE") in heard


@pytest.mark.parametrize("leaf", [RefusedClient, StaleIncarnation])
def test_a_client_shut_out_stops(coordinator, leaf):
    coordinator.faults["Upload"] = [leaf("Not you.")]
    with pytest.raises(leaf, match="Not you"):
        run(coordinator)


def test_a_client_shut_out_while_it_waits_stops(coordinator):
    coordinator.faults["Tasks"] = [RefusedClient("Not you.")]
    with pytest.raises(RefusedClient, match="Not you"):
        run(coordinator)


def test_another_model_is_refused_on_joining():
    with FakeCoordinator(np.zeros(SIZE + 1)) as coordinator, pytest.raises(ModelError, match="same model code"):
        run(coordinator)


def test_a_trainer_that_raises_gives_the_task_back_and_goes_on(coordinator):
    def step(weights, task, shard):
        if task.id == "site-1-0":
            raise ValueError("a bad\nbatch")
        return weights + np.arange(SIZE)

    summary = run(coordinator, trainer=trainer(step))
    assert (summary.updates, summary.failed) == (1, 1)
    [(task, why)] = coordinator.failures
    assert task == "site-1-0"
    assert "a bad" in why
    assert why.isprintable()


def test_a_trainer_that_always_raises_stops_the_client():
    def step(weights, task, shard):
        raise ValueError("broken")

    with FakeCoordinator(np.zeros(SIZE), tasks=10) as coordinator:
        with pytest.raises(TrainerError, match="broken"):
            run(coordinator, trainer=trainer(step))
        assert len(coordinator.failures) == QUICK.max_refusals
        assert coordinator.left == ["site-1"]


def test_a_trainer_with_a_wrong_delta_is_a_failure(coordinator):
    class Wrong(FunctionTrainer):
        def train(self, task, broadcast, shard, state, out):
            return Update(task.client, task.id, task.version, 1, 1, {"delta": np.zeros(3)})

    wrong = Wrong(np.zeros(SIZE), lambda weights, task, shard: weights)
    summary = run(coordinator, trainer=wrong)
    assert (summary.updates, summary.failed) == (0, 2)
    assert "float64 (3,)" in coordinator.failures[0][1]


def test_nobody_at_the_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressError, match="is the coordinator up"):
            run_client(address, "site-1", trainer(), SHARD, limits=QUICK)


@pytest.mark.parametrize("address", ["localhost", "8077", ":8077", "host:port", ""])
def test_what_is_no_address(address):
    with pytest.raises(AddressError, match="host:port"):
        run_client(address, "site-1", trainer(), SHARD, limits=QUICK)


def test_a_peer_that_speaks_no_fedge_is_named():
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(Exception, match="UNIMPLEMENTED"):
            run_client(f"127.0.0.1:{port}", "site-1", trainer(), SHARD, limits=QUICK)
    finally:
        server.stop(0).wait()


def test_every_call_has_a_deadline(coordinator):
    deadlines = {}

    def watch(method):
        plain = getattr(coordinator, method)

        def call(request, context):
            deadlines[method] = context.time_remaining()
            return plain(request, context)

        setattr(coordinator, method, call)

    coordinator.stop()
    for method in ("Join", "Tasks", "Download", "Upload", "UploadOffset", "Fail", "Leave"):
        watch(method)
    coordinator.start()
    coordinator.faults["Upload"] = [5000]
    with Session(coordinator.address, "site-1", examples=1, limits=QUICK) as session:
        task, broadcast = session.receive()
        session.send(Update("site-1", task.id, 0, 1, 1, {"delta": broadcast.vector.copy()}))
        task, _ = session.receive()
        session.fail(task, "enough")
    assert set(deadlines) >= {"Join", "Tasks", "Download", "Upload", "UploadOffset", "Fail"}
    streams = {"Tasks", "Download", "Upload"}
    for method, seconds in deadlines.items():
        assert 0 < seconds < 1 + (QUICK.stream_timeout_s if method in streams else QUICK.rpc_timeout_s)


def test_closing_frees_whoever_waits(coordinator):
    coordinator.task_of = lambda client: type("Never", (), {"id": "held"})()
    coordinator.stop()
    coordinator.start()
    connection = Connection(coordinator.address, "site-1", QUICK)
    connection.join()
    ended = []

    def listen():
        try:
            connection.listen(lambda: "held", lambda task: None)
        except AddressError as error:
            ended.append(str(error))

    thread = threading.Thread(target=listen)
    thread.start()
    coordinator.wait_for(lambda: coordinator.calls["Tasks"])
    connection.close()
    thread.join(30)
    assert ended == [f"The connection to {coordinator.address} was closed."]


# ---- restarts of the client --------------------------------------------------------------------

KILLED = """
    import os, sys
    import numpy as np
    from pathlib import Path
    from fedge.client.runtime import run_client
    from fedge.client.trainer import FunctionTrainer

    class Counting(FunctionTrainer):
        def train(self, task, broadcast, shard, state, out):
            part = state.setdefault("counter", {"n": np.zeros(1, np.int64)})
            part["n"] = part["n"] + 1
            print("training", task.id, int(part["n"][0]), flush=True)
            return super().train(task, broadcast, shard, state, out)

    trainer = Counting(np.zeros(3000), lambda weights, task, shard: weights + np.arange(3000))
    summary = run_client(sys.argv[1], "site-1", trainer, np.arange(5), folder=Path(sys.argv[2]))
    print("summary", summary.updates, summary.repeated, flush=True)
"""


def process(coordinator, folder):
    words = [sys.executable, "-c", textwrap.dedent(KILLED), coordinator.address, str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("fault", ["Upload", "Ack"])
def test_a_killed_client_sends_again_what_it_had_finished(coordinator, tmp_path, fault):
    """Killed while it sends, or between counting and answer: trained once, counted once, the state kept."""
    held, sent = threading.Event(), threading.Event()
    plain = coordinator._receive if fault == "Upload" else coordinator._count

    def hang(*words):
        answer = plain(*words) if fault == "Ack" else None
        if not held.is_set():
            held.set()
            sent.wait(30)
            words[-1].abort(CUT, "too late")
        return answer if fault == "Ack" else plain(*words)

    setattr(coordinator, "_receive" if fault == "Upload" else "_count", hang)
    first = process(coordinator, tmp_path)
    found = held.wait(30)
    os.kill(first.pid, signal.SIGKILL)
    out, _ = first.communicate(timeout=30)
    assert found
    sent.set()
    assert out.split() == ["training", "site-1-0", "1"]

    second = process(coordinator, tmp_path)
    out, _ = second.communicate(timeout=30)
    assert second.returncode == 0
    assert out.splitlines()[0] == "training site-1-1 2"  # not the first task again, and the state goes on
    assert out.splitlines()[1] == f"summary 2 {int(fault == 'Ack')}"
    assert reached(coordinator)


def test_what_is_spooled_is_resumed_at_its_offset(coordinator, tmp_path):
    """A client that is stopped in the middle of an upload goes on there when it is started again."""
    update = Update("site-1", "site-1-0", 0, 3, 5, {"delta": -np.arange(SIZE, dtype=np.float32), "extra": np.ones(2)})
    spool = Spool(tmp_path, "site-1", "run-1")
    spool.keep(update, {})
    before = Connection(coordinator.address, "site-1", QUICK)
    coordinator.faults["Upload"] = [7000]
    coordinator.faults["UploadOffset"] = [RefusedClient("killed here")]
    with pytest.raises(RefusedClient):
        before.upload(update)
    before.close()
    summary = run(coordinator, folder=tmp_path)
    assert coordinator.offsets[:2] == [0, 7000]
    assert summary.updates == 2
    assert reached(coordinator)


def test_a_refused_spooled_update_is_forgotten(coordinator, tmp_path):
    Spool(tmp_path, "site-1", "run-1").keep(Update("site-1", "old", 0, 3, 5, {"delta": np.ones(SIZE, np.float32)}), {})
    coordinator.faults["Upload"] = [TooStale("From last week.")]
    summary = run(coordinator, folder=tmp_path)
    assert (summary.updates, summary.refused) == (2, 1)
    assert Spool(tmp_path, "site-1", "run-1").pending is None


def test_a_client_with_an_unsettled_update_does_not_leave(coordinator, tmp_path):
    coordinator.faults["Upload"] = [StaleIncarnation("Fenced off.")]
    with pytest.raises(StaleIncarnation):
        run(coordinator, folder=tmp_path)
    assert coordinator.left == []
    assert Spool(tmp_path, "site-1", "run-1").pending is not None
