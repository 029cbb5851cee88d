"""The engine of the cloud's half: what shares a pass, what waits, what is late, and what goes wrong for whom."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.core.errors import DataError, Overloaded
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.collab.cloud import ContinueService, serve
from fedge.edge.llm.collab.continuer import Continuer
from fedge.edge.llm.collab.wire import STATES_MISSING, Hidden, Told, Verify, Want
from fedge.edge.llm.compute.kernels import KERNELS
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Step
from fedge.edge.llm.shards.shard import open_shard
from tests.llm_cloud import KERNEL, LAYER, WAIT_S, Halves, halves, line

IDS = np.random.default_rng(7).integers(0, 128, 40).tolist()
OTHERS = np.random.default_rng(8).integers(0, 128, 40).tolist()


class Gated(Rank):
    """Waits before each pass until it may begin, and keeps what was asked of it."""

    def forward(self, step: Step, x: Array) -> Array:
        steps: list[Step] = self.__dict__.setdefault("steps", [])
        steps.append(step)
        gate: threading.Semaphore = self.__dict__["gate"]
        if step.parts:
            self.__dict__["entered"].release()
            assert gate.acquire(timeout=WAIT_S)
        if fault := self.__dict__.get("fault"):
            raise fault
        return super().forward(step, x)


@dataclass
class Bench:
    """An engine whose passes wait for `passes`."""

    continuer: Continuer
    rank: Any
    cut: Halves
    told: "queue.Queue[Told]" = field(default_factory=queue.Queue)
    asked: int = 0

    def put(self, session: str, ids: list[int], start: int = 0) -> None:
        assert self.continuer.take(("d", session), Hidden(session, start, self.cut.states(ids)[start:])) is None

    def want(self, session: str, position: int, deadline_s: float = WAIT_S, owner: str = "me") -> int:
        self.asked += 1
        question = Want(session, self.asked, position, deadline_s)
        self.continuer.ask(("d", session), question, owner, self.told.put)
        return self.asked

    def wait_for_pass(self) -> None:
        """Until one waits to begin."""
        assert self.rank.entered.acquire(timeout=WAIT_S)

    def passes(self, count: int = 1000) -> None:
        self.rank.gate.release(count)

    def hear(self) -> Told:
        return self.told.get(timeout=WAIT_S)

    def shapes(self) -> list[list[tuple[int, int]]]:
        """Start and count of each part of each pass."""
        return [[(part.start, part.count) for part in step.parts] for step in self.rank.steps if step.parts]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    return halves(tmp_path_factory.mktemp("model"))


@contextmanager
def running(cut: Halves, *, slots: int = 3, path: Path | None = None, **limits: Any) -> Iterator[Bench]:
    shard, allowed = open_shard(path or cut.cloud), replace(LlmLimits(), **limits)
    blocks = Resident(shard, KERNELS[KERNEL])
    rank = Gated(shard, blocks, Alone(), slots=slots, context=64, limits=allowed)
    rank.__dict__.update(gate=threading.Semaphore(0), entered=threading.Semaphore(0), steps=[])
    made = Bench(Continuer(rank, Head(shard, blocks), allowed), rank, cut)
    try:
        yield made
    finally:
        made.passes()
        made.continuer.close()


@pytest.fixture
def bench(cut: Halves, request: pytest.FixtureRequest) -> Iterator[Bench]:
    with running(cut, **getattr(request, "param", {})) as made:
        yield made


def test_what_came_during_a_pass_is_computed_in_the_next_one_together(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.put("b", OTHERS)
    bench.put("c", IDS[::-1])
    bench.want("a", 9)
    bench.wait_for_pass()
    for session in "abc":
        bench.want(session, 20)
    bench.passes()
    found = {told.id: told.token for told in (bench.hear() for _ in range(4))}
    assert found == {
        1: cut.greedy(IDS)[9],
        2: cut.greedy(IDS)[20],
        3: cut.greedy(OTHERS)[20],
        4: cut.greedy(IDS[::-1])[20],
    }
    assert bench.shapes() == [[(0, 10)], [(10, 11), (0, 21), (0, 21)]]


@pytest.mark.parametrize("bench", [{"max_step_tokens": 16, "chunk_tokens": 8}], indirect=True)
def test_long_sequences_take_several_passes_and_hold_nobody_up(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.put("b", OTHERS[:3])
    bench.want("a", 39)
    bench.wait_for_pass()
    bench.want("b", 2)
    bench.passes()
    assert [(told.session, told.token) for told in (bench.hear(), bench.hear())] == [
        ("b", cut.greedy(OTHERS[:3])[2]),
        ("a", cut.greedy(IDS)[39]),
    ]
    assert bench.shapes() == [[(0, 16)], [(0, 3), (16, 5)], [(21, 16)], [(37, 3)]]


@pytest.mark.parametrize("bench", [{"max_step_tokens": 8}], indirect=True)
def test_a_verification_over_several_passes_is_whole(bench: Bench, cut: Halves) -> None:
    ids = IDS[:6]
    for _ in range(6):
        ids = [*ids, cut.greedy(ids)[-1]]
    bench.put("a", ids)
    bench.passes()
    question = Verify("a", 1, 5, (*ids[6:11], (ids[11] + 1) % 128), WAIT_S)
    bench.continuer.ask(("d", "a"), question, "me", bench.told.put)
    told = bench.hear()
    assert (told.accepted, told.token, told.known) == (5, ids[11], 11)
    assert bench.shapes() == [[(0, 8)], [(8, 4)]]


def test_what_is_late_by_then_is_not_computed(bench: Bench) -> None:
    bench.put("a", IDS)
    bench.put("b", OTHERS)
    bench.want("a", 39)
    bench.wait_for_pass()
    late = bench.want("b", 39, deadline_s=0.05)
    time.sleep(0.06)
    bench.passes()
    told = {one.id: one for one in (bench.hear(), bench.hear())}
    assert (told[late].reason, told[late].known) == ("TOO_LATE", 40)
    assert told[1].reason == ""
    assert bench.shapes() == [[(0, 40)]]


def test_what_no_pass_so_far_could_do_in_time_is_not_tried(bench: Bench) -> None:
    bench.put("a", IDS)
    bench.want("a", 0)
    bench.wait_for_pass()
    time.sleep(1.5)  # so long takes the fastest pass
    bench.passes()
    assert bench.hear().reason == ""
    bench.want("a", 1, deadline_s=1.2)
    assert bench.hear().reason == "TOO_LATE"
    bench.want("a", 1, deadline_s=1.2)  # but a slow one does not decide for ever
    assert bench.hear().reason == ""
    assert len(bench.shapes()) == 2


@pytest.mark.parametrize("bench", [{"slots": 1}], indirect=True)
def test_a_session_whose_slot_goes_to_another_begins_anew(bench: Bench, cut: Halves) -> None:
    bench.passes()
    for session, ids in (("a", IDS), ("b", OTHERS), ("a", IDS)):
        assert bench.continuer.known(("d", session)) == 0
        bench.want(session, 0)
        assert (bench.hear().reason, bench.told.empty()) == (STATES_MISSING, True)
        bench.put(session, ids)
        bench.want(session, 39)
        assert bench.hear().token == cut.greedy(ids)[39]


@pytest.mark.parametrize("bench", [{"slots": 1}], indirect=True)
def test_nobody_loses_a_slot_while_waiting_for_an_answer(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.put("b", OTHERS)
    bench.want("a", 9)
    bench.wait_for_pass()
    bench.want("a", 39)
    bench.want("b", 39)
    bench.passes()
    assert [bench.hear().token for _ in range(3)] == [cut.greedy(IDS)[9], cut.greedy(IDS)[39], cut.greedy(OTHERS)[39]]


@pytest.mark.parametrize("bench", [{"max_asks": 2, "max_requests": 3}], indirect=True)
def test_more_questions_than_may_wait_are_refused(bench: Bench) -> None:
    for session in "abc":
        bench.put(session, IDS)
    bench.want("a", 1)
    bench.want("b", 1)
    with pytest.raises(Overloaded):
        bench.want("c", 1)
    bench.want("c", 1, owner="another")
    with pytest.raises(Overloaded):
        bench.want("c", 2, owner="one more")
    bench.passes()
    assert {bench.hear().reason for _ in range(3)} == {""}
    bench.want("c", 2)
    assert bench.hear().reason == ""


def test_questions_of_who_has_left_and_of_what_is_over_are_dropped(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.put("b", OTHERS)
    bench.want("a", 3)
    bench.wait_for_pass()
    bench.want("a", 30, owner="gone")
    bench.want("b", 39)
    bench.continuer.leave("gone")
    bench.continuer.forget(("d", "b"))
    bench.continuer.forget(("d", "a"))  # while it is computed
    assert [(told.id, told.reason, told.known) for told in (bench.hear(), bench.hear())] == [
        (3, STATES_MISSING, 0),
        (1, STATES_MISSING, 0),
    ]
    bench.put("a", OTHERS)
    last = bench.want("a", 39)
    bench.passes()
    told = bench.hear()
    assert (told.id, told.token) == (last, cut.greedy(OTHERS)[39])
    assert bench.told.empty()
    assert bench.shapes() == [[(0, 4)], [(0, 40)]]


def test_a_question_about_what_was_let_go_ends_the_session_and_all_its_questions(bench: Bench) -> None:
    bench.put("a", IDS)
    bench.want("a", 20)
    bench.wait_for_pass()
    bench.want("a", 10)
    bench.want("a", 31)
    bench.passes()
    told = [bench.hear() for _ in range(3)]
    assert [(one.id, one.reason, one.known) for one in told] == [
        (1, "", 40),
        (3, STATES_MISSING, 0),
        (2, STATES_MISSING, 0),
    ]


def test_extreme_states_are_their_own_tenant_s_trouble(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.put("c", OTHERS)
    wild = np.full((40, 64), np.finfo(np.float32).max, np.float32)
    bench.continuer.take(("d", "b"), Hidden("b", 0, wild))
    bench.want("c", 0)
    bench.wait_for_pass()
    for session in "ab":
        bench.want(session, 39)
    bench.passes()
    told = {one.session: one for one in (bench.hear() for _ in range(3))}
    assert told["a"].token == cut.greedy(IDS)[39]
    assert [len(shape) for shape in bench.shapes()] == [1, 2]


def test_a_pass_that_fails_is_told_and_the_next_one_is_right(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.want("a", 20)
    bench.wait_for_pass()
    bench.rank.__dict__["fault"] = ZeroDivisionError("secret")
    bench.passes()
    told = bench.hear()
    assert (told.reason, told.known, "secret" in told.detail) == ("INTERNAL", 40, False)
    bench.rank.__dict__["fault"] = DataError("This is known.")
    bench.want("a", 20)
    assert bench.hear().detail == "This is known."
    del bench.rank.__dict__["fault"]
    bench.want("a", 20)
    assert bench.hear().token == cut.greedy(IDS)[20]


def _broken(*_: Any) -> Array:
    raise MemoryError


def test_a_pass_that_cannot_be_planned_is_told_to_all_who_wait(bench: Bench, cut: Halves) -> None:
    bench.put("a", IDS)
    bench.put("b", OTHERS)
    bench.want("a", 20)
    bench.wait_for_pass()
    contexts: Any = bench.continuer._contexts
    window, contexts.window = contexts.window, _broken
    bench.want("a", 30)
    bench.want("b", 30)
    bench.passes()
    assert [bench.hear().reason for _ in range(3)] == ["", "INTERNAL", "INTERNAL"]
    contexts.window = window
    bench.want("b", 30)
    assert bench.hear().token == cut.greedy(OTHERS)[30]


def test_memory_is_given_back_though_the_pass_after_finds_none(bench: Bench) -> None:
    bench.passes()
    bench.put("a", IDS)
    bench.want("a", 39)
    bench.hear()
    bench.put("b", OTHERS)
    contexts: Any = bench.continuer._contexts
    contexts.window = _broken
    with bench.continuer._changed:  # so that one pass is planned for both
        bench.continuer.forget(("d", "a"))
        bench.want("b", 30)
    assert bench.hear().reason == "INTERNAL"
    until = time.monotonic() + WAIT_S
    while max(bench.rank.cache.lengths) and time.monotonic() < until:
        time.sleep(0.005)
    assert bench.rank.cache.lengths == [0, 0, 0]


def test_logits_that_are_no_numbers_are_refused(cut: Halves, tmp_path: Path) -> None:
    shard = open_shard(cut.cloud)
    block = next(block for block in shard.blocks if block.part == "head")
    broken = tmp_path / cut.cloud.name
    broken.write_bytes(cut.cloud.read_bytes())
    with broken.open("r+b") as file:
        file.seek(block.offset)
        file.write(np.full(8, np.nan, np.float32).tobytes())
    with running(cut, path=broken) as one:
        one.passes()
        one.put("a", IDS)
        one.want("a", 39)
        assert one.hear().reason == "BAD_MODEL"


def test_memory_of_a_session_that_is_over_is_given_back(bench: Bench) -> None:
    bench.passes()
    bench.put("a", IDS)
    bench.want("a", 39)
    bench.hear()
    assert max(bench.rank.cache.lengths) == 40
    bench.continuer.forget(("d", "a"))
    until = time.monotonic() + WAIT_S
    while max(bench.rank.cache.lengths) and time.monotonic() < until:
        time.sleep(0.005)
    assert bench.rank.cache.lengths == [0, 0, 0]


@pytest.mark.parametrize("bench", [{"session_idle_s": 0.05}], indirect=True)
def test_a_session_that_says_nothing_is_forgotten(bench: Bench) -> None:
    bench.put("a", IDS)
    until = time.monotonic() + WAIT_S
    while bench.continuer.known(("d", "a")) and time.monotonic() < until:
        time.sleep(0.01)
    assert bench.continuer.known(("d", "a")) == 0


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_device_asked_before_it_hung_up_is_not_computed(bench: Bench, cut: Halves, finished: bool) -> None:
    service = ContinueService(bench.continuer, cut.digest, LAYER, LlmLimits())
    with ExitStack() as opened:
        listening = serve(service, "127.0.0.1:0", None, "", LlmLimits())
        opened.callback(listening.stop)
        stays = opened.enter_context(line(listening.address, cut.digest))
        stays.put("a", 0, cut.states(IDS))
        stays.want("a", 9)
        bench.wait_for_pass()
        with line(listening.address, cut.digest) as goes:
            goes.put("a", 0, cut.states(OTHERS))
            assert goes.known("a") == 40
            goes.want("a", 39)
            assert goes.known("a") == 40  # the question has come before
            if finished:  # it says so before it hangs up
                goes.finish()
                wait_until(lambda: service._streams[goes.client]._finished)
        wait_until(lambda: len(bench.continuer._queue) == 1)
        wait_until(lambda: list(service._streams) == [stays.client])
        stays.want("a", 10)
        stays.finish()  # who only says nothing more is answered
        with pytest.raises(queue.Empty):
            stays.told.get(timeout=0.2)
        bench.passes()
        assert [stays.hear().token for _ in range(2)] == cut.greedy(IDS)[9:11]
    assert bench.shapes() == [[(0, 10)], [(10, 1)]]


def wait_until(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)
