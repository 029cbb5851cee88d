"""Workers as processes that are killed, stopped and started again while a model answers."""

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedge.core.errors import ExperimentError, RankLost
from fedge.edge.llm.engine.engine import Engine
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.group import group as groups
from fedge.edge.llm.group.child import Settings
from fedge.edge.llm.group.division import everyone
from fedge.edge.llm.group.local import child, local
from fedge.edge.llm.group.store import Store
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.models.folder import open_folder
from fedge.llm import Engine as WholeEngine
from tests.llm_fixture import folder
from tests.llm_group_head import KERNEL, LIMITS, MEMORY, PROMPT, SPEED, alone, greedy, head, until

WORD = "the word of the test"


@pytest.fixture
def model(tmp_path):
    return folder(tmp_path)


def worker(group, tmp_path, name="a"):
    """A context with a worker in a process of its own."""
    return child(Settings(group.address, name, MEMORY, str(tmp_path / f"store-{name}"), WORD, KERNEL, SPEED, LIMITS))


@contextmanager
def answering(group, model, **settings):
    """An engine over the group, which recovers."""
    engine = Engine(
        model, None, vocab=128, slots=2, context=128, limits=LIMITS, recover=group.recover, speculate=False, **settings
    )
    try:
        yield engine
    finally:
        engine.close()


def ask(engine, count, prompt=PROMPT, on_piece=None):
    return engine.submit(Request(tuple(prompt), count, Sampling(temperature=0), stop_tokens=()), on_piece)


def tokens(handle):
    pieces = list(handle)
    assert pieces[-1].finish == "length", pieces[-1].error
    return [piece.token for piece in pieces if piece.token is not None]


def opened(tmp_path, model, **settings):
    return head(model, tmp_path / "head", ticket=Ticket("", WORD), **settings)


def test_a_group_on_one_machine_answers_like_one_rank_and_ends_as_a_whole(model, tmp_path):
    answer = alone(model, tmp_path / "alone", 20)
    with open_folder(model) as opened_folder:
        settings = {"kind": "float32", "slots": 2, "context": 128, "speed": SPEED, "kernel": KERNEL}
        with local(opened_folder, 2, store=tmp_path / "store", divide=everyone, limits=LIMITS, **settings) as group:
            formed = group.form(20)
            assert group.names == ("head", "local-1")
            assert greedy(formed, 20) == answer


def test_a_child_that_cannot_work_ends_the_start_with_its_sentence(model, tmp_path):
    taken = Store(tmp_path / "store" / "local-1", LIMITS)
    settings = {"kind": "float32", "slots": 2, "context": 128, "speed": SPEED, "kernel": KERNEL}
    began = time.monotonic()
    with (
        open_folder(model) as opened_folder,
        local(opened_folder, 2, store=tmp_path / "store", divide=everyone, limits=LIMITS, **settings) as group,
        pytest.raises(ExperimentError, match="Another worker uses"),
    ):
        group.form(600)
    assert time.monotonic() - began < 60
    taken.close()


def test_a_folder_that_cannot_be_used_is_said_with_a_remedy(model, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        open_folder(model) as folder,
        pytest.raises(ExperimentError, match="name another for shards"),
        local(folder, 1, kind="int8", store=tmp_path / "file" / "below", slots=1, context=16),
    ):
        pass


def test_no_ranks_are_refused(model, tmp_path):
    with pytest.raises(ExperimentError, match="ask for 1 to 64"):
        WholeEngine(model, ranks=0, store=tmp_path / "store")


def test_one_word_to_stop_at_is_one(tmp_path, monkeypatch):
    asked = []
    with WholeEngine(folder(tmp_path, vocab=320), kind="float32", kernel=KERNEL, store=tmp_path / "store") as engine:
        monkeypatch.setattr(engine.engine, "submit", asked.append)
        engine.generate("a", stop="END")
        engine.generate("a", stop=["END", "STOP"])
    assert [one.stop for one in asked] == [("END",), ("END", "STOP")]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_is_told_to_end_ends_its_ranks_and_dismisses_others(tmp_path, how, code):
    """Ctrl-C reaches all processes of a terminal; the ranks go on until the head lets them."""
    model, others = folder(tmp_path, vocab=320), tmp_path / "others"
    words = ["serve", str(model), "--all", "--kind", "float32", "--kernel", KERNEL, "--listen", "127.0.0.1:0"]
    address = free_address()
    with child(Settings(address, "b", MEMORY, str(others), "", KERNEL, SPEED, LIMITS)) as worker:
        for more, ranks in ((["--ranks", "2"], "head, local-1"), (["--devices", "1", "--control", address], "head, b")):
            with subprocess.Popen(
                [sys.executable, "-m", "fedge", "llm", *words, "--store", str(tmp_path / "head"), *more],
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            ) as server:
                said = []
                while "serving" not in (said or [""])[-1]:
                    said.append(server.stderr.readline())
                    assert said[-1], "".join(said)
                assert ranks in "".join(said)
                line = http.client.HTTPConnection(said[-1].split("/")[-2], timeout=20)
                line.request("GET", "/health")  # the line that says "serving" comes a moment before
                assert line.getresponse().status == 200
                line.close()
                os.killpg(server.pid, how)
                rest = server.stderr.read()
                assert server.wait(60) == code
            assert "Traceback" not in rest
            assert "lost" not in rest
        assert worker.poll() is None


@pytest.mark.slow
def test_a_server_that_is_told_to_end_while_ranks_load_waits_for_them_first(tmp_path):
    words = ["serve", str(folder(tmp_path, vocab=320)), "--ranks", "2", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [sys.executable, "-m", "fedge", "llm", *words, "--store", str(tmp_path / "store")],
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        said = []
        while "local-1 has joined" not in (said or [""])[-1]:
            said.append(server.stderr.readline())
            assert said[-1], "".join(said)
        (rank,) = children(server.pid)
        server.terminate()
        rest = server.stderr.read()
        assert server.wait(60) == 0, rest
    assert "Traceback" not in rest
    with pytest.raises(ProcessLookupError):
        os.kill(rank, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
@pytest.mark.parametrize("pieces", [0, 7])
def test_a_worker_lost_in_prefill_or_while_decoding_changes_no_token(model, tmp_path, how, pieces):
    """`pieces` tokens have come when it is hit; with none, the prompt is under way."""
    answer = alone(model, tmp_path / "alone", 40)
    with opened(tmp_path, model, wanted=2) as group, contextlib.ExitStack() as children:
        processes = [children.enter_context(worker(group, tmp_path, name)) for name in "ab"]
        formed = group.form(30)
        assert len(group.names) == 3
        hit = threading.Event()
        came = []

        def on_piece(piece):
            came.append(piece)
            if len(came) == pieces:
                os.kill(processes[1].pid, how)
                hit.set()

        if not pieces:
            slow_down(formed, lambda: os.kill(processes[1].pid, how))
        with answering(group, formed) as engine:
            handle = ask(engine, 40, on_piece=on_piece)
            until(lambda: came and came[-1].finish is not None, 60)
            assert came[-1].finish == "length", came[-1].error
            assert [piece.token for piece in came if piece.token is not None] == answer
            assert handle.usage
            if how != signal.SIGTERM:
                assert engine.stats()["recoveries"] >= 1
                assert len(group.names) == 2
        if how == signal.SIGSTOP:
            assert len(group.devices()) in (1, 2)
            os.kill(processes[1].pid, signal.SIGCONT)
            until(group.better, 60)
            assert greedy(group.recover(), 40) == answer
            assert len(group.names) == 3


def slow_down(formed, strike):
    """Strike in the middle of the first pass: after the step was sent, before the sums."""
    mesh, once = formed._mesh, []
    send = mesh.send_step

    def send_step(step, x=None):
        send(step, x)
        if step is not None and not once:
            once.append(1)
            strike()

    mesh.send_step = send_step


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_while_it_loads_is_done_without(model, tmp_path, how, monkeypatch):
    answer = alone(model, tmp_path / "alone")
    find, processes, hit = groups.Cuts.find, {}, []

    def strike(self, digest):
        if not hit:
            hit.append(digest)
            os.kill(processes["a"].pid, how)
        return find(self, digest)

    monkeypatch.setattr(groups.Cuts, "find", strike)
    limits = replace(LIMITS, silence_s=3.0)
    with opened(tmp_path, model, wanted=2, limits=limits) as group, contextlib.ExitStack() as children:
        for name in "ba":  # the one that is hit has the higher rank, and the other is not ready yet
            processes[name] = children.enter_context(worker(group, tmp_path, name))
            until(lambda name=name: name in {one.name for one in group.devices()})
        assert greedy(group.form(30)) == answer
        assert hit
        assert group.names == ("head", "b")
        if how == signal.SIGSTOP:
            os.kill(processes["a"].pid, signal.SIGCONT)
            until(lambda: "a" in {one.name for one in group.devices()}, 60)


@pytest.mark.slow
def test_a_worker_that_comes_back_is_used_again_between_requests(model, tmp_path):
    answer = alone(model, tmp_path / "alone", 20)
    with opened(tmp_path, model, wanted=1) as group:
        with worker(group, tmp_path) as process:
            formed = group.form(30)
            process.kill()
            process.wait()
            with answering(group, formed) as engine:
                assert tokens(ask(engine, 20)) == answer
            assert group.names == ("head",)
        with worker(group, tmp_path):
            until(group.better, 60)
            with answering(group, group.improve()) as engine:
                assert tokens(ask(engine, 20)) == answer
            assert group.names == ("head", "a")
            assert group.improve() is None


@pytest.mark.slow
def test_all_workers_killed_at_once_leave_the_head_alone(model, tmp_path):
    answer = alone(model, tmp_path / "alone", 30)
    with opened(tmp_path, model, wanted=2) as group, contextlib.ExitStack() as children:
        processes = [children.enter_context(worker(group, tmp_path, name)) for name in "ab"]
        with answering(group, group.form(30)) as engine:
            handles = [ask(engine, 30), ask(engine, 30)]
            for process in processes:
                process.kill()
            assert [tokens(handle) for handle in handles] == [answer, answer]
            assert tokens(ask(engine, 30)) == answer
        assert group.names == ("head",)


@pytest.mark.slow
def test_a_silent_worker_that_the_error_names_is_left_out_though_its_stream_stands(model, tmp_path):
    with (
        opened(tmp_path, model, wanted=2, limits=replace(LIMITS, silence_s=60.0)) as group,
        contextlib.ExitStack() as on,
    ):
        processes = {name: on.enter_context(worker(group, tmp_path, name)) for name in "ab"}
        formed = group.form(30)
        os.kill(processes["b"].pid, signal.SIGSTOP)
        with pytest.raises(RankLost):
            greedy(formed)
        group.recover()
        assert group.names == ("head", "a")
        assert {one.name: one.phase for one in group.devices()} == {"a": "running", "b": "ending"}
        assert not group.better()
        processes["b"].kill()


@pytest.mark.slow
def test_a_head_that_is_killed_is_waited_for_by_its_workers_and_its_children_end(model, tmp_path):
    """The head is a process here; the worker belongs to the test, the child to the head."""
    script = f"""
import sys
from pathlib import Path
from tests.llm_group_head import head, greedy
from tests.test_llm_group_processes import WORD, worker
from fedge.edge.llm.mesh.security import Ticket
tmp = Path({str(tmp_path)!r})
with head(Path({str(model)!r}), tmp / "head", ticket=Ticket("", WORD), wanted=2, listen=sys.argv[1]) as group:
    with worker(group, tmp, "child") as process:
        formed = group.form(30)
        print(group.address, process.pid, sorted(group.names), greedy(formed), flush=True)
        sys.stdin.read()
"""
    answer = alone(model, tmp_path / "alone")

    def start(listen):
        return subprocess.Popen(
            [sys.executable, "-c", script, listen], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    with start(free_address()) as first:
        address = first.args[-1]
        settings = Settings(address, "b", MEMORY, str(tmp_path / "b"), WORD, KERNEL, SPEED, LIMITS)
        with child(settings) as mine:
            line = first.stdout.readline().split(" ", 2)
            assert line[2].strip() == f"['b', 'child', 'head'] {answer}"
            first.kill()
            first.wait()
            until(lambda: not alive(int(line[1])), 60)
            with start(address) as second:
                assert second.stdout.readline().split(" ", 2)[2].strip() == f"['b', 'child', 'head'] {answer}"
                second.stdin.close()
                second.wait(60)
            assert mine.poll() is None


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def children(pid):
    """The numbers of a process's own."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(one) for each in lists for one in each.read_text().split()]


def alive(pid):
    """Whether a process runs; a dead one may wait for its parent."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_workers_that_come_and_go_at_random_change_no_token(model, tmp_path):
    chance = random.Random(5)
    answer = alone(model, tmp_path / "alone", 60)
    with opened(tmp_path, model, wanted=1) as group, contextlib.ExitStack() as children:
        processes = {name: children.enter_context(worker(group, tmp_path, name)) for name in "ab"}
        model_now = group.form(30)
        for _ in range(6):
            name = chance.choice("ab")
            with answering(group, model_now) as engine:
                handle = ask(engine, 60)
                time.sleep(chance.random() / 20)
                processes[name].kill()
                processes[name].wait()
                assert tokens(handle) == answer
            processes[name] = children.enter_context(worker(group, tmp_path, name))
            until(lambda: len(group.devices()) == 2, 20)
            model_now = group.recover()
            assert greedy(model_now, 60) == answer
