"""The scheduler against an oracle that holds every slot's history: whatever comes, each sequence gets what it would get
alone."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedge.core.errors import DataError, ExperimentError, TooLong
from fedge.edge.llm.engine.lookup import Lookup
from fedge.edge.llm.engine.scheduler import MAX_DRAFT, MIN_COMMON, Scheduler
from fedge.edge.llm.ranks.step import Copy, Part
from tests.llm_oracle import VOCAB, Oracle, alone

LONG = [(7 * at + at // 5) % VOCAB for at in range(40)]


def choose(logits, want):
    """Greedy tokens for a want: one, and one more per right guess."""
    tokens = []
    for row, guess in zip(logits[want.row :], (*want.draft, None), strict=False):
        tokens.append(int(np.argmax(row)))
        if tokens[-1] != guess:
            break
    return tokens


def advance(scheduler, oracle, answers, ends=()):
    """One pass; sequences that have all their tokens end."""
    plan = scheduler.plan()
    if plan is None:
        return None
    logits = oracle.run(plan.step, plan.tokens, plan.rows)
    for want in plan.wants:
        tokens = choose(logits, want)
        scheduler.accept(want, tokens)
        answers[want.key] += tokens
        if len(answers[want.key]) >= dict(ends).get(want.key, 10**9):
            scheduler.end(want.key)
    return plan


def finish(scheduler, oracle, answers, ends):
    while scheduler.running or scheduler.waiting:
        assert advance(scheduler, oracle, answers, ends) is not None


class Users(RuleBasedStateMachine):
    """Any order of arrivals, cancellations, passes and failures."""

    def __init__(self):
        super().__init__()
        self.scheduler, self.oracle = Scheduler(3, 64, 12, 5, max_kv_tokens=100), Oracle(3, 64, memory=3)
        self.asked, self.answers, self.ends, self.key = {}, {}, {}, 0

    @rule(
        shared=st.integers(0, 40),
        own=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
        new=st.integers(1, 30),
        drafts=st.booleans(),
    )
    def submit(self, shared, own, new, drafts):
        self.key += 1
        prompt = LONG[:shared] + own
        self.ends[self.key] = self.scheduler.new_tokens(len(prompt), new)
        self.scheduler.add(self.key, prompt, new, drafts=drafts)
        self.asked[self.key], self.answers[self.key] = prompt, []

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        self.scheduler.end(data.draw(st.sampled_from(sorted(self.asked))))

    @rule(passes=st.integers(1, 12))
    def step(self, passes):
        for _ in range(passes):
            plan = advance(self.scheduler, self.oracle, self.answers, self.ends)
            assert plan is None or plan.step.tokens <= 12

    @rule(other=st.booleans())
    def lose(self, other):
        """A pass fails before it has changed anything, and the same model is used again, or another one."""
        self.scheduler.plan()
        if other:
            self.oracle = Oracle(3, 64, memory=3)
        self.scheduler.forget()

    @invariant()
    def every_answer_is_that_of_the_model_alone(self):
        for key, answer in self.answers.items():
            assert answer == alone(self.asked[key], len(answer), memory=3)
            assert len(answer) <= self.ends[key]

    @invariant()
    def slots_are_accounted_for(self):
        assert self.scheduler.kv_tokens <= 100
        assert sum(slot.owner is not None for slot in self.scheduler.slots) == len(self.scheduler.running)
        for key, slot in self.scheduler.running.items():
            assert slot.owner.key == key
            assert slot.length < len(slot.tokens) <= slot.owner.most
        for slot, held in zip(self.scheduler.slots, self.oracle.slots, strict=True):
            assert held[: slot.length] == slot.tokens[: slot.length]
            assert len(held) <= slot.high or slot.index in self.scheduler._frees

    def teardown(self):
        left = {slot.owner.key for slot in self.scheduler.running.values()} | {w.key for w in self.scheduler.waiting}
        finish(self.scheduler, self.oracle, self.answers, self.ends)
        self.every_answer_is_that_of_the_model_alone()
        assert all(len(self.answers[key]) == self.ends[key] for key in left)
        assert all(slot.owner is None for slot in self.scheduler.slots)


TestUsers = Users.TestCase
TestUsers.settings = settings(
    max_examples=30, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.slow
def test_users_of_many_kinds():
    class Many(Users):
        pass

    case = Many.TestCase
    case.settings = settings(
        max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case().runTest()


def test_a_long_prompt_is_read_in_chunks_while_others_decode():
    scheduler, oracle, answers = Scheduler(3, 64, 20, 6), Oracle(3, 64), {1: [], 2: [], 3: []}
    scheduler.add(1, [1], 20)
    scheduler.add(2, [2], 20)
    advance(scheduler, oracle, answers)
    scheduler.add(3, LONG, 5)
    for _ in range(7):
        plan = advance(scheduler, oracle, answers)
        assert [part.count for part in plan.step.parts] in ([1, 1, 6], [1, 1, 4])
    assert [len(answers[key]) for key in (1, 2, 3)] == [8, 8, 1]


def test_a_prompt_alone_takes_the_whole_pass_and_asks_for_no_logits_before_its_end():
    scheduler = Scheduler(2, 64, 30, 6)
    scheduler.add(1, LONG, 5)
    first, second = scheduler.plan(), scheduler.plan()
    assert first.step.parts == (Part(0, 0, 30),)
    assert len(first.rows) == 0
    assert first.wants == ()
    assert second.step.parts == (Part(0, 30, 10),)
    assert second.rows.tolist() == [9]


def test_first_come_first_served():
    scheduler, oracle, answers, order = Scheduler(2, 64, 20, 8), Oracle(2, 64), {key: [] for key in range(6)}, []
    for key in range(6):
        scheduler.add(key, LONG[: 5 * (6 - key)], 3)
    while scheduler.running or scheduler.waiting:
        advance(scheduler, oracle, answers, dict.fromkeys(range(6), 3))
        order += [key for key in scheduler.running if key not in order]
    assert order == list(range(6))


def test_an_ended_request_leaves_its_prefix_to_the_next_and_one_token_is_computed_again():
    scheduler, oracle, answers = Scheduler(2, 64, 60), Oracle(2, 64), {1: [], 2: [], 3: []}
    scheduler.add(1, LONG, 4)
    finish(scheduler, oracle, answers, {1: 4})
    scheduler.add(2, LONG + answers[1] + [5], 2)
    plan = advance(scheduler, oracle, answers)
    # The last token of the first answer was never computed with.
    assert plan.step.parts == (Part(0, 43, 2),)
    assert scheduler.reused(2) == 43
    scheduler.end(2)
    scheduler.add(3, LONG, 2)
    plan = advance(scheduler, oracle, answers)
    assert plan.step.parts == (Part(0, 39, 1),)
    assert answers[3] == answers[1][:1]


def test_a_prefix_in_a_busy_slot_is_copied():
    scheduler, oracle, answers = Scheduler(2, 64, 60), Oracle(2, 64), {1: [], 2: []}
    scheduler.add(1, LONG, 9)
    advance(scheduler, oracle, answers)
    scheduler.add(2, [*LONG[:30], 1, 2], 9)
    plan = advance(scheduler, oracle, answers)
    assert plan.step.copies == (Copy(0, 1, 30),)
    assert plan.step.parts == (Part(0, 40, 1), Part(1, 30, 2))
    assert answers[2] == alone([*LONG[:30], 1, 2], 1)


def test_a_conversation_is_not_overwritten_for_a_short_beginning_while_a_slot_is_empty():
    scheduler, oracle, answers = Scheduler(2, 64, 60), Oracle(2, 64), {1: [], 2: []}
    scheduler.add(1, LONG, 1)
    finish(scheduler, oracle, answers, {1: 1})
    scheduler.add(2, [*LONG[:MIN_COMMON], 3], 1)
    plan = advance(scheduler, oracle, answers)
    assert plan.step.copies == (Copy(0, 1, MIN_COMMON),)
    assert oracle.slots[0] == LONG


def test_idle_slots_are_freed_oldest_first_where_the_budget_needs_it():
    scheduler, oracle, answers = Scheduler(3, 64, 60, max_kv_tokens=64), Oracle(3, 64), {1: [], 2: [], 3: []}
    scheduler.add(1, [1] * 20, 1)
    finish(scheduler, oracle, answers, {1: 1})
    scheduler.add(2, [2] * 20, 1)
    finish(scheduler, oracle, answers, {2: 1})
    scheduler.add(3, [3] * 25, 10)
    plan = advance(scheduler, oracle, answers)
    assert plan.step.free == (0,)
    assert [len(held) for held in oracle.slots] == [0, 20, 25]


def test_a_stranger_takes_an_empty_slot_and_then_the_one_that_was_idle_longest():
    scheduler, oracle, answers = Scheduler(3, 64, 60), Oracle(3, 64), {key: [] for key in range(1, 5)}
    taken = []
    for key in (1, 2, 3, 4):
        scheduler.add(key, [key] * 20, 1)
        plan = advance(scheduler, oracle, answers, {key: 1})
        taken.append((plan.step.parts[0].slot, plan.step.free))
    assert taken == [(0, ()), (1, ()), (2, ()), (0, (0,))]


def test_a_slot_is_not_freed_in_the_pass_that_copies_from_it():
    scheduler, oracle, answers = Scheduler(4, 64, 60, max_kv_tokens=90), Oracle(4, 64), {1: [], 2: [], 3: []}
    scheduler.add(1, LONG, 1)
    finish(scheduler, oracle, answers, {1: 1})
    scheduler.add(2, [*LONG[:MIN_COMMON], 3], 9)
    scheduler.add(3, [3] * 30, 10)
    first, second = advance(scheduler, oracle, answers), advance(scheduler, oracle, answers)
    assert (first.step.copies, first.step.free) == ((Copy(0, 1, MIN_COMMON),), ())
    assert (second.step.copies, second.step.free) == ((), (0,))
    assert list(scheduler.running) == [2, 3]


def test_a_slot_that_is_copied_from_may_be_taken_in_the_same_pass():
    scheduler, oracle, answers = Scheduler(2, 64, 60), Oracle(2, 64), {1: [], 2: [], 3: []}
    scheduler.add(1, LONG, 1)
    finish(scheduler, oracle, answers, {1: 1})
    scheduler.add(2, [*LONG[:MIN_COMMON], 3], 9)
    scheduler.add(3, [3] * 5, 10)
    plan = advance(scheduler, oracle, answers)
    assert (plan.step.copies, plan.step.free) == ((Copy(0, 1, MIN_COMMON),), ())
    assert plan.step.parts == (Part(1, MIN_COMMON, 1), Part(0, 0, 5))
    assert answers[2] == alone([*LONG[:MIN_COMMON], 3], 1)


def test_who_does_not_fit_waits_and_is_not_passed_by():
    scheduler, oracle, answers = Scheduler(3, 64, 60, max_kv_tokens=64), Oracle(3, 64), {1: [], 2: [], 3: []}
    scheduler.add(1, [1] * 30, 10)
    scheduler.add(2, [2] * 30, 10)
    scheduler.add(3, [3], 1)
    advance(scheduler, oracle, answers)
    assert list(scheduler.running) == [1]
    scheduler.end(1)
    advance(scheduler, oracle, answers)
    assert list(scheduler.running) == [2, 3]


def test_lost_ranks_cost_a_sequence_time_only():
    scheduler, oracle, answers = Scheduler(2, 64, 16), Oracle(2, 64), {1: []}
    scheduler.add(1, LONG[:10], 12)
    for _ in range(5):
        advance(scheduler, oracle, answers)
    scheduler.plan()
    scheduler.forget()
    oracle = Oracle(2, 64)
    plan = advance(scheduler, oracle, answers)
    assert plan.step.free == (0, 1)
    assert plan.step.parts == (Part(0, 0, 15),)
    finish(scheduler, oracle, answers, {1: 12})
    assert answers[1] == alone(LONG[:10], 12)


def test_guesses_save_passes_and_change_no_token():
    counts = {}
    for drafts in (False, True):
        scheduler, oracle, answers = Scheduler(1, 64, 16), Oracle(1, 64, memory=1), {1: []}
        scheduler.add(1, LONG[:10], 40, drafts=drafts)
        finish(scheduler, oracle, answers, {1: 40})
        assert answers[1][:40] == alone(LONG[:10], 40, memory=1)
        counts[drafts] = len(oracle.steps)
    assert counts[False] == 40
    assert counts[True] <= 20


def test_a_draft_is_what_followed_last_time_and_grows_with_its_success():
    lookup, tokens = Lookup(MAX_DRAFT), [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    assert lookup.draft([1, 2, 3], 4) == ()
    assert lookup.draft(tokens, 4) == (4, 5)
    lookup.learn(2)
    assert lookup.draft(tokens, 4) == (4, 5, 6)
    assert lookup.draft(tokens, 1) == (4,)
    lookup.learn(0)
    assert lookup.draft([*tokens, 9, 1, 2, 3], 4) == (9,)
    assert lookup.draft([*tokens, 9, 1, 2, 3, 9], 4) == (1,)


def test_prompts_that_cannot_run_are_refused_with_the_numbers():
    scheduler = Scheduler(2, 64, max_kv_tokens=50)
    assert scheduler.new_tokens(40, 5) == 5
    assert scheduler.new_tokens(40, 500) == 10
    with pytest.raises(TooLong, match="50 tokens, and 50"):
        scheduler.add(1, [1] * 50, 1)
    with pytest.raises(DataError, match="no token"):
        scheduler.add(1, [], 1)
    assert not scheduler.waiting


@pytest.mark.parametrize("sizes", [(0, 64, 16), (2, 1, 16), (17, 64, 16)])
def test_sizes_that_cannot_work_are_refused(sizes):
    with pytest.raises(ExperimentError, match="cannot work"):
        Scheduler(*sizes)


def test_slots_and_passes_of_the_smallest_size_still_serve_everybody():
    scheduler, oracle, answers = Scheduler(2, 64, 2, 1), Oracle(2, 64, memory=2), {key: [] for key in range(4)}
    for key in range(4):
        scheduler.add(key, LONG[: 3 + key], 20, drafts=True)
    finish(scheduler, oracle, answers, dict.fromkeys(range(4), 20))
    assert all(answers[key][:20] == alone(LONG[: 3 + key], 20, memory=2) for key in range(4))
