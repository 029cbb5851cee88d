"""Memory, files, threads and objects after thousands of requests are those after hundreds, and counters go over 2^32.

What is compared is the state after a warm-up with the state after four or five times as much of the same; both when
nothing runs any more.
"""

import ctypes
import gc
import json
import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedge.core.errors import DataError
from fedge.edge.llm.api.http import app
from fedge.edge.llm.api.http_server import Server
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.engine.scheduler import Scheduler
from fedge.edge.llm.group import speeds
from fedge.edge.llm.mesh import frames
from fedge.edge.llm.ranks.kvcache import KVCache
from fedge.edge.llm.ranks.step import Part, Step
from fedge.llm import Engine
from tests import llm_group
from tests.llm_fixture import folder
from tests.llm_group_head import SPEED

VOCAB, CONTEXT, SLOTS = 320, 128, 4
MOST_ANONYMOUS = 3 << 20  # bytes that a process may grow by: allocators keep some, requests nothing
MOST_OBJECTS = 100
SETTLE_S = 30.0
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class State:
    """Of this process and of its children, in the order of their numbers."""

    anonymous: tuple[int, ...]
    files: tuple[int, ...]
    threads: tuple[int, ...]
    objects: int


def state() -> State:
    """At this moment, without what only waits to be collected, or has been freed and is kept by the C library."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pids = [os.getpid(), *sorted(children())]
    status = [dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()) for pid in pids]
    return State(
        tuple(int(one["RssAnon"].split()[0]) << 10 for one in status),
        tuple(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids),
        tuple(int(one["Threads"]) for one in status),
        len(gc.get_objects()),
    )


def children() -> list[int]:
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for one in lists for pid in one.read_text().split()]


def flat(before: State) -> State:
    """The state now; fails where it does not become that of `before` within a time."""
    due_at = time.monotonic() + SETTLE_S
    while (wrong := grown(before, now := state())) and time.monotonic() < due_at:
        time.sleep(0.2)  # connections end when the other end has noticed
    assert not wrong, f"{wrong}\n{before}\n{now}"
    return now


def grown(before: State, now: State) -> list[str]:
    """What is more than it was."""
    found = [name for name in ("files", "threads") if more(getattr(before, name), getattr(now, name), 0)]
    found += ["anonymous"] * more(before.anonymous, now.anonymous, MOST_ANONYMOUS)
    return found + ["objects"] * (now.objects > before.objects + MOST_OBJECTS)


def more(before: tuple[int, ...], now: tuple[int, ...], allowed: int) -> bool:
    return len(before) != len(now) or any(new > old + allowed for old, new in zip(before, now))


@contextmanager
def engine(tmp: Path):
    """Two ranks, one of them in a process of its own, and a model of which a pass takes no time."""
    store = tmp / "store"
    store.mkdir()
    known = replace(SPEED, machine=speeds._machine())
    (store / speeds.FILE).write_bytes(msgspec.json.encode(known))
    settings = {"kind": "float32", "kernel": "numpy-float32", "memory_bytes": 1 << 30, "use_all": True}
    path = folder(tmp, vocab=VOCAB, layers=1, hidden=32, ffn=64, context=CONTEXT)
    others = len(children())  # that tests before have left, such as the tracker of multiprocessing
    with Engine(path, ranks=2, slots=SLOTS, context=CONTEXT, store=store, **settings) as made:
        assert len(children()) == others + 1
        yield made


def still(made: Engine) -> None:
    """Until nothing runs or waits."""
    due_at = time.monotonic() + SETTLE_S
    while (stats := made.stats())["running"] or stats["waiting"]:
        assert time.monotonic() < due_at, stats
        time.sleep(0.01)


# ---- through the engine ------------------------------------------------------------------------


def asked(made: Engine, chance: random.Random, count: int) -> Counter[str]:
    """So many requests, a few at a time: read, cancelled, refused and forgotten ones. How they ended."""
    ends: Counter[str] = Counter()
    handles = []
    for number in range(count):
        prompt = [chance.randrange(3, VOCAB) for _ in range(chance.randrange(2, 24))]
        if number % 10 == 3:
            with pytest.raises(DataError):
                made.generate([VOCAB] if number % 20 == 3 else prompt * CONTEXT)
            ends["refused"] += 1
            continue
        handle = made.generate(prompt, max_tokens=chance.randrange(1, 6), stop=["w9"])
        if number % 10 == 5:
            handle.cancel()
        if number % 10 != 7:  # nobody ever looks at the others
            handles.append(handle)
        if len(handles) == 2 * SLOTS:
            ends.update(list(one)[-1].finish for one in handles)
            handles = []
    ends.update(list(one)[-1].finish for one in handles)
    still(made)
    return ends


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_requests_leave_nothing_in_any_rank(tmp_path):
    chance = random.Random(0)
    with engine(tmp_path) as made:
        asked(made, chance, 2000)
        before = state()
        ends = asked(made, chance, 8000)
        flat(before)
        assert ends["refused"] == 800
        assert ends["length"] > 5000
        assert ends["cancelled"] > 400
        assert not ends["error"]


# ---- over HTTP ---------------------------------------------------------------------------------


@contextmanager
def served(made: Engine):
    """The address of its server."""
    with Server(app(made, made.tokenizer, "tiny"), "127.0.0.1:0") as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.address
        finally:
            server.stop()
            thread.join(20)
            assert not thread.is_alive(), "the server does not end"


def raw(address: str, body: bytes, *, length: int | None = None, path: str = "/v1/completions") -> socket.socket:
    """A connection on which a request has been sent; with another `length` its body never ends."""
    host, port = address.split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    sock.sendall(f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
    return sock


def ask(address: str, kind: str, prompt: list[int]) -> str:
    """One request of this kind; what came of it."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    body |= {"stream": True} if kind in ("stream", "hang up") else {}
    body |= {"hang up": {"max_tokens": 100}, "gone": {"max_tokens": 100}, "long": {"prompt": [5] * CONTEXT}}.get(
        kind, {}
    )
    body |= {"model": "other"} if kind == "unknown" else {}
    told = b"{" if kind == "no JSON" else json.dumps(body).encode()
    sock = raw(address, told, length=10_000 if kind == "half" else None)
    with sock:
        if kind in ("gone", "half"):
            return kind
        if kind == "hang up":
            assert sock.recv(1 << 16)
            return kind
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    return answer.split(b" ", 2)[1].decode()


KINDS = ["whole", "stream", "hang up", "gone", "half", "no JSON", "unknown", "long", "whole", "stream"]


def asked_over_http(address: str, chance: random.Random, count: int) -> Counter[str]:
    """All kinds in turn, from two clients at a time."""
    ends: Counter[str] = Counter()
    lock = threading.Lock()

    def client(seed: int) -> None:
        own = random.Random(seed)
        for number in range(count // 2):
            prompt = [own.randrange(3, VOCAB) for _ in range(own.randrange(2, 24))]
            end = ask(address, KINDS[number % len(KINDS)], prompt)
            with lock:
                ends[end] += 1

    threads = [threading.Thread(target=client, args=(chance.random(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_thousand_requests_over_http_leave_nothing_however_they_end(tmp_path):
    chance = random.Random(1)
    with engine(tmp_path) as made, served(made) as address:
        asked_over_http(address, chance, 1000)
        still(made)
        before = state()
        ends = asked_over_http(address, chance, 2000)
        still(made)
        flat(before)
        assert ends == {"200": 800, "hang up": 200, "gone": 200, "half": 200, "400": 400, "404": 200}
        assert made.stats()["finished_cancelled"] > 100


# ---- failures ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_models_that_fail_and_groups_that_are_formed_again_leave_nothing(tmp_path, monkeypatch):
    # pytest keeps what is logged, and with a traceback all that it refers to.
    monkeypatch.setattr(logging.getLogger("fedge"), "disabled", True)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with engine(tmp_path) as made:

        def rounds(count: int) -> None:
            for _ in range(count):
                model = made.engine._model
                model.run = fail  # type: ignore[method-assign]
                failed = list(made.generate([5, 6, 7], max_tokens=3))[-1]
                assert failed.finish == "error"
                model = made.engine._model
                assert list(made.generate([5, 6, 7], max_tokens=3))[-1].finish == "length"
                assert made.engine._model is not model
            still(made)

        rounds(10)
        before = state()
        rounds(40)
        flat(before)
        assert made.group.epoch == 51
        assert len(made.group.names) == 2


# ---- what counts up ----------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("collective", ["full", "star", "doubling"])
def test_a_mesh_goes_over_the_end_of_its_sequence_numbers(collective, secure):
    """At 500 sums per second a number of 32 bits lasts a hundred days."""

    def work(mesh) -> list[float]:
        for link in mesh._group.links.values():
            link._sent = link._received = frames._MASK - 3
        sums = []
        for number in range(8):
            step = Step((Part(0, number, 1),))
            x = np.full((1, 4), number, np.float32)
            if mesh.rank == 0:
                mesh.send_step(step, x)
            else:
                assert mesh.receive_step()[0] == step
            sums.append(float(mesh.allreduce(x + mesh.rank).sum()))
        used = [link for link in mesh._group.links.values() if link._sent != frames._MASK - 3]
        assert used
        assert all(0 < link._sent < 40 for link in used)
        return sums

    wanted = [4.0 * (4 * number + 6) for number in range(8)]
    results = llm_group.group(4, work, collective=collective, secure=secure)
    assert results == [wanted] * 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_day_of_tokens_keeps_scheduler_and_cache_in_step_and_small():
    """Requests come, are cancelled and fail for 200,000 passes; the cache refuses any step that does not fit."""
    chance = random.Random(3)
    cache = KVCache(2, 2, 16, slots=SLOTS, context=CONTEXT)
    plans = Scheduler(SLOTS, CONTEXT, step_tokens=64, chunk_tokens=32, max_kv_tokens=3 * CONTEXT)
    keys, begun = iter(range(1 << 62, 1 << 63)), [0, 0]

    def passes(count: int) -> None:
        for _ in range(count):
            if len(plans.waiting) < 3:
                prompt = [chance.randrange(4) for _ in range(chance.randrange(1, 60))]
                plans.add(next(keys), prompt, chance.randrange(1, 60), drafts=chance.random() < 0.5)
            if chance.random() < 0.01 and plans.running:
                plans.end(chance.choice(list(plans.running)))
            if chance.random() < 0.001:
                plans.forget()
            plan = plans.plan()
            if plan is None:
                continue
            cache.begin(plan.step)
            begun[0] += 1
            begun[1] += plan.step.tokens
            for part in plan.step.parts:
                for layer in cache.entries[part.slot]:
                    layer[:, :, part.start : part.start + part.count] = 1
            for want in plan.wants:
                if chance.random() < 0.03:
                    plans.end(want.key)
                else:
                    plans.accept(want, [chance.randrange(4)])
                    slot = plans.running[want.key]
                    if len(slot.tokens) >= slot.owner.most:
                        plans.end(want.key)

    passes(40_000)
    before = state()
    plans._passes += 1 << 32
    passes(160_000)
    flat(before)
    cache.close()
    assert begun[0] > 190_000
    assert begun[1] > 500_000
    assert plans.kv_tokens <= 3 * CONTEXT
