"""The engine with its thread, against the oracle: streams, stops, cancellations, failures and the end."""

import asyncio
import gc
import random
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import AddressError, DataError, ExperimentError, ModelError, Overloaded, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.engine.engine import MAX_LOSSES, Engine
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling, logprobs
from fedge.edge.llm.engine.stops import StopText
from tests.llm_oracle import VOCAB, Oracle, alone, logits

GREEDY = Sampling(temperature=0)
PROMPT = tuple((7 * at + at // 5) % VOCAB for at in range(30))


class Letters:
    """A tokenizer: token 0 is the letter a, and so on; token 10 is half of a character, the next token the rest."""

    eos = (9,)

    def stream(self):
        return Spelling()

    def spell(self, tokens):
        spelling = Spelling()
        return "".join(map(spelling.push, tokens)) + spelling.flush()


class Spelling:
    half = False

    def push(self, token):
        if token == 10:
            self.half, out = True, "?" if self.half else ""
            return out
        out, self.half = ("é" if self.half else "") + chr(97 + token), False
        return out

    def flush(self):
        return "?" if self.half else ""


@pytest.fixture
def started():
    engines = []

    def start(model, tokenizer=None, *, vocab=VOCAB, slots=3, context=64, **more):
        engines.append(Engine(model, tokenizer, vocab=vocab, slots=slots, context=context, **more))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()
        assert not engine._thread.is_alive()


class Gate(Oracle):
    """An oracle that lets a pass through only when told to."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.passes, self.entered = threading.Semaphore(0), threading.Semaphore(0)

    def run(self, step, tokens, rows):
        self.entered.release()
        assert self.passes.acquire(timeout=20)
        return super().run(step, tokens, rows)


def tokens(pieces):
    return [piece.token for piece in pieces if piece.token is not None]


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_a_request_streams_the_tokens_of_the_model_alone(started):
    engine = started(Oracle(3, 64))
    handle = engine.submit(Request(PROMPT, 8, GREEDY))
    pieces = list(handle)
    assert tokens(pieces) == alone(PROMPT, 8)
    assert [piece.finish for piece in pieces] == [None] * 7 + ["length"]
    assert list(handle) == []
    usage = handle.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.reused_tokens) == (30, 8, 0)


def test_twenty_users_at_random_get_what_each_gets_alone(started):
    chance = random.Random(5)
    engine = started(Oracle(3, 64, memory=3), max_kv_tokens=150)
    asked = []
    for at in range(20):
        prompt = PROMPT[: chance.randrange(1, 31)] + tuple(chance.choices(range(VOCAB), k=chance.randrange(3)))
        sampling = Sampling(temperature=chance.choice([0.0, 0.9]), top_p=0.9, frequency_penalty=0.3, seed=at)
        handle = engine.submit(Request(prompt, chance.randrange(1, 30), sampling))
        if chance.random() < 0.3:
            threading.Timer(chance.random() / 100, handle.cancel).start()
        asked.append((prompt, sampling, handle))
        time.sleep(chance.random() / 500)
    for prompt, sampling, handle in asked:
        pieces = list(handle)
        got = tokens(pieces)
        assert got == alone(prompt, len(got), sampling, memory=3)
        assert pieces[-1].finish in ("length", "cancelled")
    stats = engine.stats()
    assert stats["finished_length"] + stats["finished_cancelled"] == 20
    assert stats["running"] == stats["waiting"] == 0


def test_stop_tokens_end_an_answer_and_add_no_text(started):
    engine = started(Oracle(3, 64, memory=4), Letters())
    expected = alone(PROMPT, 60, memory=4, stop_tokens=(9,))
    assert expected[-1] == 9
    pieces = list(engine.submit(Request(PROMPT, None, GREEDY)))
    assert tokens(pieces) == expected
    assert pieces[-1].finish == "stop"
    assert text(pieces) == Letters().spell(expected[:-1])
    pieces = list(engine.submit(Request(PROMPT, 4, GREEDY, stop_tokens=(expected[1],))))
    assert tokens(pieces) == expected[:2]


def test_a_stop_string_is_found_across_tokens_and_not_given_out(started):
    engine = started(Oracle(3, 64, memory=3), Letters())
    whole = Letters().spell(alone(PROMPT, 30, memory=3))
    stop = whole[4:8]
    pieces = list(engine.submit(Request(PROMPT, 30, GREEDY, stop=(stop, "zzz"), stop_tokens=())))
    assert text(pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    # Held back to the end, since the stop string could still have come.
    pieces = list(engine.submit(Request(PROMPT, 5, GREEDY, stop=(whole[:5] + "zzz",), stop_tokens=())))
    assert text(pieces) == Letters().spell(alone(PROMPT, 5, memory=3))
    assert pieces[-1].finish == "length"


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.randoms())
def test_stops_are_found_however_the_text_is_cut(whole, stops, chance):
    found = [whole.find(stop) for stop in stops if stop in whole]
    stop_text, out, at, stopped = StopText(tuple(stops)), "", 0, False
    while at < len(whole) and not stopped:
        size = chance.randint(1, 4)
        given_out, stopped = stop_text.push(whole[at : at + size])
        out, at = out + given_out, at + size
        assert whole.startswith(out)
    assert stopped == bool(found)
    if stopped:
        # A stop that comes complete first may begin later than another one that is still open.
        ends = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
        assert min(found) <= len(out) < ends
    else:
        assert out + stop_text.flush() == whole


def test_logprobs_are_those_of_the_model(started):
    engine = started(Oracle(3, 64))
    pieces = list(engine.submit(Request(PROMPT, 3, GREEDY, top_logprobs=2)))
    assert pieces[0].logprob == logprobs(logits(PROMPT), pieces[0].token, 2)
    assert [len(piece.logprob.top) for piece in pieces] == [2, 2, 2]


def test_a_seed_is_repeatable_and_no_seed_is_not(started):
    engine = started(Oracle(3, 64))

    def answer(seed):
        return tokens(engine.submit(Request(PROMPT, 20, Sampling(temperature=3.0, seed=seed))))

    assert answer(4) == answer(4)
    assert answer(4) != answer(5)
    assert answer(None) != answer(None)


def test_a_cancelled_request_ends_and_its_slot_serves_the_next(started):
    model = Gate(1, 64)
    engine = started(model, slots=1)
    first, second = engine.submit(Request(PROMPT, 30, GREEDY)), engine.submit(Request((1, 2), 2, GREEDY))
    model.passes.release(2)
    assert next(first).token == alone(PROMPT, 1)[0]
    first.cancel()
    first.cancel()
    model.passes.release(50)
    assert [piece.finish for piece in first][-1] == "cancelled"
    assert tokens(second) == alone((1, 2), 2)
    first.cancel()


def test_a_waiting_request_can_be_cancelled(started):
    model = Gate(1, 64)
    engine = started(model, slots=1)
    first, second = engine.submit(Request(PROMPT, 3, GREEDY)), engine.submit(Request((1, 2), 2, GREEDY))
    assert model.entered.acquire(timeout=20)
    second.cancel()
    model.passes.release(50)
    assert [piece.finish for piece in second] == ["cancelled"]
    assert tokens(first) == alone(PROMPT, 3)


def test_too_many_requests_are_turned_away_until_one_ends(started):
    model = Gate(1, 64)
    engine = started(model, slots=1, limits=replace(LlmLimits(), max_requests=2))
    handles = [engine.submit(Request(PROMPT, 2, GREEDY)) for _ in range(2)]
    with pytest.raises(Overloaded, match="2 requests"):
        engine.submit(Request(PROMPT, 2, GREEDY))
    model.passes.release(50)
    assert list(handles[0])[-1].finish == "length"
    assert list(engine.submit(Request(PROMPT, 2, GREEDY)))[-1].finish == "length"


def test_what_cannot_run_is_refused_at_once(started):
    engine = started(Oracle(3, 64))
    with pytest.raises(DataError, match="64 tokens, and 64"):
        engine.submit(Request((1,) * 64))
    with pytest.raises(DataError, match="none of the model's 11"):
        engine.submit(Request((1, 11)))
    with pytest.raises(DataError, match="max_tokens"):
        Request((1,), 0)
    with pytest.raises(DataError, match="stop strings"):
        Request((1,), stop=("",))
    with pytest.raises(DataError, match="top_logprobs"):
        Request((1,), top_logprobs=21)
    with pytest.raises(ExperimentError, match="limit of 16"):
        started(Oracle(1, 64), slots=17)
    assert len(tokens(engine.submit(Request((1,) * 60, 100, GREEDY)))) == 4


def test_a_stream_goes_on_after_lost_ranks_without_repeating_a_token(started):
    first, second = Oracle(3, 64), Oracle(3, 64)
    first.fail = [None] * 4 + [RankLost("Rank 1 fell silent.", 1)]
    models = [second]
    engine = started(first, recover=models.pop)
    handles = [engine.submit(Request(PROMPT[:size], 12, GREEDY)) for size in (5, 9, 30, 7)]
    for size, handle in zip((5, 9, 30, 7), handles, strict=True):
        assert tokens(handle) == alone(PROMPT[:size], 12)
    assert engine.stats()["recoveries"] == 1
    assert len(first.steps) == 5


def test_requests_queue_while_ranks_are_recovered(started):
    first, release = Oracle(3, 64), threading.Event()
    first.fail = [RankLost("Rank 1 fell silent.", 1)]
    recovering = threading.Event()

    def recover():
        recovering.set()
        assert release.wait(20)
        return Oracle(3, 64)

    engine = started(first, recover=recover)
    early = engine.submit(Request(PROMPT, 3, GREEDY))
    assert recovering.wait(20)
    late = engine.submit(Request((1, 2), 3, GREEDY))
    release.set()
    assert tokens(early) == alone(PROMPT, 3)
    assert tokens(late) == alone((1, 2), 3)


def test_a_recovery_that_is_under_way_is_given_up_at_the_end(started):
    first, given_up, recovering = Oracle(3, 64), threading.Event(), threading.Event()
    first.fail = [RankLost("Rank 1 fell silent.", 1)]

    def recover():
        recovering.set()
        given_up.wait(60)
        raise AddressError("The group is about to end; start the model again.")

    engine = started(first, recover=recover, give_up=given_up.set)
    handle = engine.submit(Request(PROMPT, 3, GREEDY))
    assert recovering.wait(20)
    engine.close()
    assert given_up.is_set()
    assert not engine._thread.is_alive()
    assert [piece.finish for piece in handle] == ["cancelled"]


def test_a_recovery_that_fails_ends_requests_with_its_sentence_and_is_tried_again(started):
    first, outcomes = Oracle(3, 64), [Oracle(3, 64), ModelError("Only rank 0 is left; start another device.")]
    first.fail = [RankLost("Rank 1 fell silent.", 1)]

    def recover():
        outcome = outcomes.pop()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    engine = started(first, recover=recover)
    last = list(engine.submit(Request(PROMPT, 3, GREEDY)))[-1]
    assert (last.finish, last.error) == ("error", "Only rank 0 is left; start another device.")
    assert last.cause is RankLost  # a device may come back
    assert tokens(engine.submit(Request(PROMPT, 3, GREEDY))) == alone(PROMPT, 3)


def test_a_request_that_loses_ranks_again_and_again_ends(started):
    recoveries = []

    def recover():
        recoveries.append(Oracle(3, 64))
        recoveries[-1].fail = [RankLost("Rank 1 ran out of memory.", 1)] if len(recoveries) <= MAX_LOSSES else []
        return recoveries[-1]

    first = Oracle(3, 64)
    first.fail = [RankLost("Rank 1 ran out of memory.", 1)]
    engine = started(first, recover=recover)
    last = list(engine.submit(Request(PROMPT, 3, GREEDY)))[-1]
    assert (last.finish, last.error) == ("error", "Rank 1 ran out of memory.")
    assert len(recoveries) == MAX_LOSSES
    assert tokens(engine.submit(Request(PROMPT, 3, GREEDY))) == alone(PROMPT, 3)


def test_losses_with_tokens_in_between_are_survived(started):
    model = Oracle(3, 64)
    model.fail = [None, RankLost("Rank 1 restarts.", 1)] * (MAX_LOSSES + 3)
    engine = started(model, recover=lambda: model)
    assert tokens(engine.submit(Request(PROMPT, 12, GREEDY))) == alone(PROMPT, 12)
    assert engine.stats()["recoveries"] == MAX_LOSSES + 3


def test_a_better_model_mends_a_change_that_failed(started):
    """The next request need not recover what works."""
    found, recovered = [Oracle(3, 64), ModelError("A shard cannot be cut.")], []

    def between():
        outcome = found.pop() if found else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    engine = started(Oracle(3, 64), recover=lambda: recovered.append(1) or Oracle(3, 64), between=between)
    until = time.monotonic() + 20
    while found:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert tokens(engine.submit(Request(PROMPT, 3, GREEDY))) == alone(PROMPT, 3)
    assert not recovered


@pytest.mark.parametrize("error", [RankLost("Rank 1 fell silent.", 1), ZeroDivisionError("secret path")])
def test_any_failure_of_a_model_ends_what_ran_and_the_engine_lives_on(started, error):
    model = Oracle(3, 64)
    model.fail = [None, None, error]
    engine = started(model)
    handles = [engine.submit(Request(PROMPT[:size], 9, GREEDY)) for size in (5, 9)]
    last = list(handles[0])[-1]
    assert last.finish == "error"
    assert last.error in ("Rank 1 fell silent.", "The model failed (ZeroDivisionError); try again.")
    assert list(handles[1])[-1].finish
    assert tokens(engine.submit(Request(PROMPT, 3, GREEDY))) == alone(PROMPT, 3)


def test_logits_that_are_no_numbers_end_only_their_request(started):
    class Sick(Oracle):
        def run(self, step, flat, rows):
            out = super().run(step, flat, rows)
            out[[8 in self.slots[part.slot][:1] for part in step.parts][: len(out)]] = np.nan
            return out

    engine = started(Sick(3, 64))
    well, sick = engine.submit(Request((1, 2), 9, GREEDY)), engine.submit(Request((8, 2), 9, GREEDY))
    assert tokens(well) == alone((1, 2), 9)
    assert [(piece.finish, "no numbers" in piece.error) for piece in sick] == [("error", True)]


def test_logits_of_the_wrong_shape_leave_nobody_waiting(started):
    class Short(Oracle):
        def run(self, step, flat, rows):
            return super().run(step, flat, rows)[:0]

    assert [piece.finish for piece in started(Short(3, 64)).submit(Request((1, 2), 9, GREEDY))] == ["error"]


def test_guesses_are_exact_and_can_be_switched_off(started):
    steps = []
    for speculate in (True, False):
        model = Oracle(3, 64, memory=1)
        engine = started(model, speculate=speculate)
        assert tokens(engine.submit(Request(PROMPT[:10], 50, GREEDY))) == alone(PROMPT[:10], 50, memory=1)
        steps.append(len(model.steps))
        assert (engine.stats()["accepted_tokens"] > 0) == speculate
    assert steps[0] < steps[1] == 50


def test_an_answer_ends_at_a_stop_token_that_was_guessed(started):
    prompt = tuple(alone(PROMPT[:10], 40, memory=1))
    ahead = alone(prompt, 2, memory=1)
    assert ahead[0] != ahead[1]
    engine = started(Oracle(3, 64, memory=1))
    handle = engine.submit(Request(prompt, 20, GREEDY, stop_tokens=(ahead[1],)))
    assert tokens(handle) == ahead
    assert handle.usage.completion_tokens == 2
    assert engine.stats()["drafted_tokens"] > 0


def test_pieces_reach_an_event_loop_without_a_thread_per_request(started):
    engine = started(Oracle(3, 64))

    async def user(prompt):
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        engine.submit(Request(prompt, 6, GREEDY), lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
        got = [await pieces.get()]
        while got[-1].finish is None:
            got.append(await pieces.get())
        return tokens(got)

    async def users():
        return await asyncio.gather(*(user(PROMPT[:size]) for size in range(1, 9)))

    threads = threading.active_count()
    assert asyncio.run(users()) == [alone(PROMPT[:size], 6) for size in range(1, 9)]
    assert threading.active_count() <= threads


def test_a_receiver_that_raises_costs_only_its_own_request(started):
    engine, calls = started(Oracle(3, 64)), []

    def broken(piece):
        calls.append(piece)
        raise ValueError("nobody listens")

    engine.submit(Request(PROMPT, 30, GREEDY), broken)
    assert tokens(engine.submit(Request((1, 2), 9, GREEDY))) == alone((1, 2), 9)
    while engine.stats()["running"]:
        time.sleep(0.001)
    assert calls[-1].finish == "cancelled"
    assert len(calls) < 10


def test_close_ends_all_and_nothing_can_be_asked_after_it(started):
    model = Gate(1, 64)
    engine = started(model, slots=1)
    handles = [engine.submit(Request(PROMPT, 30, GREEDY)) for _ in range(3)]
    assert model.entered.acquire(timeout=20)
    closer = threading.Thread(target=engine.close)
    closer.start()
    model.passes.release(5)
    assert [list(handle)[-1].finish for handle in handles] == ["cancelled"] * 3
    closer.join(20)
    assert engine.stats()["running"] == 0
    with pytest.raises(AddressError, match="closed"):
        engine.submit(Request(PROMPT))


def test_a_receiver_may_close_the_engine(started):
    model, ends = Gate(3, 64), []
    engine = started(model)

    def last(piece):
        ends.append(piece.finish)
        engine.close()

    for size in (3, 4):
        engine.submit(Request(PROMPT[:size], 30, GREEDY), last)
    model.passes.release(9)
    engine._thread.join(20)
    assert ends.count("cancelled") == 2


def test_close_does_not_wait_for_ever_for_a_model_that_hangs(started):
    model = Gate(1, 64)
    engine = started(model, slots=1, limits=replace(LlmLimits(), step_timeout_s=0.05))
    handle = engine.submit(Request(PROMPT, 30, GREEDY))
    assert model.entered.acquire(timeout=20)
    engine.close()
    assert list(handle)[-1].finish == "cancelled"
    model.passes.release(5)
    engine._thread.join(20)


def test_figures_tell_times_and_reuse():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    class Slow(Oracle):
        def run(self, *of):
            clock.now += 0.5
            return super().run(*of)

    clock = Clock()
    engine = Engine(Slow(2, 64), vocab=VOCAB, slots=2, context=64, clock=clock, speculate=False)
    handle = engine.submit(Request(PROMPT, 4, GREEDY))
    assert len(tokens(handle)) == 4
    assert (handle.usage.ttft_s, handle.usage.tpot_s) == (0.5, 0.5)
    again = engine.submit(Request(PROMPT, 1, GREEDY))
    assert len(tokens(again)) == 1
    assert again.usage.reused_tokens == 29
    engine.close()
    stats = engine.stats()
    expected = {"steps": 5, "generated_tokens": 5, "prompt_tokens": 60, "reused_tokens": 29, "busy_s": 2.5}
    assert {name: stats[name] for name in expected} == expected
    assert stats["tokens_per_s"] == 2.0
    assert stats["mean_ttft_s"] == 0.5


def test_means_are_of_requests_that_have_such_a_time(started):
    model = Oracle(3, 64)
    model.fail = [None, None, None, RankLost("Rank 1 fell silent.", 1)]
    engine = started(model, recover=None, speculate=False)
    assert len(tokens(engine.submit(Request(PROMPT, 3, GREEDY)))) == 3
    first = engine.stats()
    failed = list(engine.submit(Request(PROMPT, 3, GREEDY)))
    assert (failed[-1].finish, failed[-1].cause) == ("error", RankLost)
    for name in ("mean_ttft_s", "mean_tpot_s"):
        assert engine.stats()[name] == first[name] > 0


@pytest.mark.slow
def test_memory_stays_flat_over_ten_thousand_requests(started):
    engine = started(Oracle(3, 64, memory=2), Letters())
    objects = []
    for _ in range(10):
        for at in range(1000):
            handle = engine.submit(Request((at % VOCAB, 1, at % 7), 2, GREEDY, stop=("xyz",)))
            if at % 50 == 0:
                handle.cancel()
            assert list(handle)[-1].finish
        engine._model.steps.clear()
        gc.collect()
        objects.append(len(gc.get_objects()))
    assert engine.stats()["generated_tokens"] > 10_000
    assert objects[-1] - objects[0] < 500
