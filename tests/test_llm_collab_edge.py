"""The device's half by itself: rows that wait, the rule of exits, kept states, and what goes up to the cloud."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.core.errors import AddressError, ExperimentError, ModelError, TooLate
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.collab import decider, wire
from fedge.edge.llm.collab import uplink as uplinks
from fedge.edge.llm.collab.cloud import cloud_at
from fedge.edge.llm.collab.exchange import Exchange, Question
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.states import States
from fedge.edge.llm.collab.wire import STATES_MISSING, Forget, Hidden, Told, Verify, Want
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.mesh.security import Ticket, identity
from fedge.edge.llm.models.folder import open_folder
from tests import llm_reference as reference
from tests.llm_device import CONTEXT, GREEDY, KERNEL, Cut, Scripted, blocks, cut_model, until

SAMPLED = Sampling(temperature=0.8, top_p=0.95, seed=11)
LAWS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    return cut_model(tmp_path_factory.mktemp("cut"), layers=4, exits=(1, 2, 3))


@pytest.fixture
def segments(model: Cut) -> Iterator[Segments]:
    made = model.segments()
    yield made
    made.close()


def states_of(path: Path, ids: list[int], layers: int) -> Array:
    """What the whole model has behind so many layers."""
    with open_folder(path) as opened:
        x = opened.embed(ids)
        for layer in range(layers):
            name, eps = f"model.layers.{layer}.", opened.config.eps
            normed = reference.norm(x, opened.tensor(name + "input_layernorm.weight"), eps)
            x = x + reference.attention(opened, name + "self_attn.", normed)
            normed = reference.norm(x, opened.tensor(name + "post_attention_layernorm.weight"), eps)
            x = x + reference.ffn(opened, name + "mlp.", normed)
    return x


# ---- rows that wait --------------------------------------------------------------------------------

ORDERS = st.lists(st.tuples(st.lists(st.integers(0, 127), min_size=1, max_size=5), st.integers(-1, 2)), max_size=8)


@given(orders=ORDERS, backs=st.lists(st.integers(0, 30), max_size=3))
@LAWS
def test_states_are_those_of_the_whole_model_whatever_was_put_off(
    model: Cut, segments: Segments, orders: list[tuple[list[int], int]], backs: list[int]
) -> None:
    segments.clear()
    text: list[int] = []
    kept = np.zeros((CONTEXT, 64), np.float32)
    for number, (tokens, depth) in enumerate([*orders, ([5], 2)]):
        segments.feed(tokens)
        text += tokens
        rows = segments.reach(depth) if depth >= 0 else np.empty((0, 64))
        assert segments.length == len(text)
        if depth >= 0:  # the last token has come through, with all that waited for it
            np.testing.assert_allclose(rows[-1:], states_of(model.model, text, depth + 1)[-1:], rtol=1e-4, atol=1e-5)
        start, states = segments.take_states()
        kept[start : start + len(states)] = states
        if number < len(orders) and number < len(backs):
            length = min(backs[number], len(text))
            segments.back(length)
            text = text[:length]
    assert segments.deferred == 0
    np.testing.assert_allclose(kept[: len(text)], states_of(model.model, text, 3), rtol=1e-4, atol=1e-5)


def test_rows_wait_and_are_counted(segments: Segments) -> None:
    segments.feed([1, 2, 3])
    assert segments.deferred == 3
    assert len(segments.reach(1)) == 3
    assert len(segments.reach(1)) == 0
    segments.feed([4])
    assert segments.deferred == 4
    assert len(segments.reach(2)) == 4
    assert segments.deferred == 0
    assert [len(segments.take_states()[1]) for _ in range(2)] == [4, 0]


def test_long_prompts_go_through_in_steps(model: Cut) -> None:
    limits = LlmLimits(max_step_tokens=4)
    made = Segments(model.shards, blocks, context=CONTEXT, limits=limits)
    text = list(range(11))
    made.feed(text)
    np.testing.assert_allclose(made.reach(2), states_of(model.model, text, 3), rtol=1e-4, atol=1e-5)
    made.close()


def test_the_head_is_the_models(model: Cut, segments: Segments) -> None:
    z = np.random.default_rng(0).standard_normal((3, 64), np.float32)
    with open_folder(model.model) as opened:
        wanted = z @ opened.tensor("lm_head.weight").T
    np.testing.assert_allclose(segments.head(z), wanted, rtol=1e-5, atol=1e-5)


def test_shards_that_are_no_line_are_refused(model: Cut, tmp_path: Path) -> None:
    first, second, third = model.shards
    other = cut_model(tmp_path, layers=4, exits=(1, 2, 3), seed=1).shards
    for line in ((first, third), (second, third), (first, second), (first, other[1], third)):
        with pytest.raises(ModelError, match="cut it again"):
            Segments(line, blocks, context=8)


# ---- the rule --------------------------------------------------------------------------------------


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), st.floats(0, 1))
def test_an_exit_answers_where_it_is_sure_enough_and_never_at_one(numbers: list[float], threshold: float) -> None:
    logits = np.array(numbers, np.float32)
    weights = np.exp(logits.astype(float) - logits.max())
    found = decider.confidence(logits)
    assert found == pytest.approx((weights / weights.sum()).max(), rel=1e-9)
    assert decider.answers(found, threshold) == (threshold < 1 and found >= threshold)
    assert not decider.answers(1.0, 1.0)


def test_an_exit_without_numbers_does_not_answer() -> None:
    for bad in (np.nan, np.inf):
        assert not decider.answers(decider.confidence(np.array([0.0, bad], np.float32)), 0.0)


def test_thresholds_are_the_exits_own_one_for_all_or_one_each() -> None:
    assert decider.thresholds([0.5, 0.7], None) == (0.5, 0.7)
    assert decider.thresholds([0.5, 0.7], 1) == (1.0, 1.0)
    assert decider.thresholds([0.5, 0.7], (0.1, 0.2)) == (0.1, 0.2)
    for bad in (1.5, -0.1, (0.5,), float("nan")):
        with pytest.raises(ExperimentError, match="one for each of the 2"):
            decider.thresholds([0.5, 0.7], bad)


@given(st.integers(1, 8), st.data())
def test_drafts_grow_by_one_and_halve(guesses: int, data: st.DataObject) -> None:
    offered = data.draw(st.integers(0, guesses))
    accepted = data.draw(st.integers(0, offered))
    found = decider.next_guesses(guesses, offered, accepted)
    assert 1 <= found <= decider.MOST_GUESSES
    if accepted < offered:
        assert found == max(1, guesses // 2)
    else:
        assert found == (min(guesses + 1, 8) if offered == guesses else guesses)


# ---- kept states -----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 90)), max_size=6), st.booleans())
@LAWS
def test_states_are_kept_as_they_are_sent(steps: list[tuple[int, int]], exact: bool) -> None:
    random = np.random.default_rng(0)
    made, wanted = States(3, exact=exact), np.empty((0, 3), np.float32)
    for start, count in steps:
        start = min(start, made.length)
        rows = random.standard_normal((count, 3), np.float32)
        made.put(start, rows)
        wanted = np.concatenate([wanted[:start], rows if exact else rows.astype(np.float16)])
    assert made.length == len(wanted)
    np.testing.assert_array_equal(made.rows(0, 10**6), wanted)
    made.cut(5)
    np.testing.assert_array_equal(made.rows(1, 10**6), wanted[1:5])


def test_states_beyond_float16_are_kept_exactly_and_such_as_are_none_refused() -> None:
    made = States(2, exact=False)
    made.put(0, np.array([[1e5, 0.1]], np.float32))
    np.testing.assert_array_equal(made.rows(0, 1), np.array([[1e5, 0.1]], np.float32))
    with pytest.raises(ModelError, match="no number"):
        made.put(1, np.array([[np.nan, 0]], np.float32))
    with pytest.raises(ValueError, match="gap"):
        made.put(3, np.zeros((1, 2), np.float32))


# ---- what goes up ----------------------------------------------------------------------------------


def rows_of(start: int, count: int) -> Array:
    """Row p is p everywhere."""
    return np.repeat(np.arange(start, start + count, dtype=np.float32)[:, None], 64, axis=1)


def obliging(one: wire.Asked) -> list[Told | bytes]:
    """A cloud that knows everything: token 7."""
    if isinstance(one, Verify):
        return [Told(one.id, one.session, one.position + 1 + len(one.guesses), 7, len(one.guesses))]
    return [Told(one.id, one.session, one.position + 1, 7)] if isinstance(one, Want) else []


def test_every_position_goes_up_once_in_order_and_together_where_they_come_together(model: Cut) -> None:
    with Scripted(model, obliging) as cloud:
        uplink = model.uplink(cloud.address, "f16")
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 20))
        assert uplink.wait(30)
        uplink.push(20, rows_of(20, 2))
        assert uplink.ask(21, None, 30.0).token == 7
        uplink.push(22, rows_of(22, 1))
        assert uplink.ask(22, (1, 2), 30.0).accepted == 2
        uplink.end()
        until(lambda: isinstance(cloud.asked[-1], Forget))
        uplink.close()
    assert cloud.positions == list(range(23))
    held = [one for one in cloud.asked if isinstance(one, Hidden)]
    assert len(held) <= 3
    np.testing.assert_array_equal(np.concatenate([one.rows for one in held]), rows_of(0, 23))
    assert uplink.sent_bytes == sum(cloud.sizes)  # what is forgotten included
    assert uplink.received_bytes > 0
    single = [size for one, size in zip(cloud.asked, cloud.sizes) if isinstance(one, Hidden) and len(one.rows) == 1]
    assert single
    assert all(size <= 2 * 64 + 20 for size in single)


def test_what_the_cloud_does_not_know_is_sent_again(model: Cut) -> None:
    lost: list[int] = []

    def forgetful(one: wire.Asked) -> list[Told | bytes]:
        if isinstance(one, Want) and not lost:
            lost.append(one.id)
            return [Told(one.id, one.session, 4, reason=STATES_MISSING)]
        return obliging(one)

    with Scripted(model, forgetful) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 10))
        assert uplink.ask(9, None, 30.0).token == 7
        uplink.close()
    assert cloud.positions == [*range(10), *range(4, 10)]


def test_a_cloud_that_never_learns_is_not_asked_without_end(model: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplinks, "_FIRST_REST_S", 60.0)

    def deaf(one: wire.Asked) -> list[Told | bytes]:
        return [Told(one.id, one.session, 0, reason=STATES_MISSING)] if isinstance(one, Want) else []

    with Scripted(model, deaf) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 3))
        with pytest.raises(AddressError, match="STATES_MISSING"):
            uplink.ask(2, None, 30.0)
        assert not uplink.usable  # for a while
        with pytest.raises(AddressError, match="not asked"):
            uplink.ask(2, None, 30.0)
        uplink.close()
    assert sum(isinstance(one, Want) for one in cloud.asked) == 2


def test_a_cloud_that_refuses_states_is_left_alone_for_this_sequence(model: Cut) -> None:
    def full(one: wire.Asked) -> list[Told | bytes]:
        if isinstance(one, Hidden) and one.session == "1":
            return [Told(0, one.session, 0, reason="BAD_DATA", detail="no room")]
        return obliging(one)

    with Scripted(model, full) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 3))
        until(lambda: not uplink.usable)
        uplink.push(3, rows_of(3, 3))
        with pytest.raises(AddressError, match="no room"):
            uplink.ask(5, None, 60.0)
        assert cloud.positions == [0, 1, 2]
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 2))
        assert uplink.ask(1, None, 30.0).token == 7
        uplink.close()


def test_states_that_are_refused_end_the_question_behind_them() -> None:
    talk = Exchange("1", SAMPLED, 64, "f16")
    talk.put(0, rows_of(0, 2))
    asked = talk.question = Question(5, 1, None, due_at=10.0)
    assert wire.asked(talk.next(0.0, 1 << 16) or b"", 64).session == "1"
    want = wire.asked(talk.next(4.0, 1 << 16) or b"", 64)
    assert want == Want("1", 5, 1, 6.0, SAMPLED)
    assert talk.next(4.0, 1 << 16) is None
    talk.take(Told(0, "1", 0, reason="OVERLOADED", detail="full"))
    assert asked.refused == "OVERLOADED: full"
    talk.doubt()  # another stream: it is worth a try
    assert not talk.refused


def test_late_answers_are_dropped_and_show_that_the_cloud_is_there(model: Cut, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uplinks, "_FIRST_REST_S", 60.0)
    first: list[Want] = []

    def late(one: wire.Asked) -> list[Told | bytes]:
        if isinstance(one, Want) and not first:
            first.append(one)
            return []
        if isinstance(one, Hidden) and first:
            other = Told(0, "99", 0, reason="BAD_DATA")  # of a sequence that is over
            return [other, Told(first[0].id, one.session, 1, 99)]
        return obliging(one)

    with Scripted(model, late) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 1))
        with pytest.raises(TooLate, match="0.5"):
            uplink.ask(0, None, 0.5)
        assert not uplink.usable
        uplink.push(1, rows_of(1, 1))
        until(lambda: uplink.usable)
        assert uplink.ask(1, None, 30.0).token == 7
        uplink.close()


def test_a_broken_stream_is_opened_again_and_only_what_is_missing_sent(model: Cut) -> None:
    def broken(one: wire.Asked) -> list[Told | bytes]:
        if isinstance(one, Want) and one.id == 1:
            return [b"\xff\xff no reply"]
        if isinstance(one, Hidden) and not len(one.rows):
            return [Told(0, one.session, 6)]
        return obliging(one)

    with Scripted(model, broken) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 8))
        with pytest.raises(AddressError):
            uplink.ask(7, None, 30.0)
        until(lambda: uplink.usable)
        uplink.push(8, rows_of(8, 1))
        assert uplink.ask(8, None, 30.0).token == 7
        uplink.close()
    assert cloud.streams == 2
    assert cloud.positions == [*range(8), 6, 7, 8]


def test_wrong_guesses_are_taken_back(model: Cut) -> None:
    def picky(one: wire.Asked) -> list[Told | bytes]:
        return [Told(one.id, one.session, one.position + 2, 5, 1)] if isinstance(one, Verify) else obliging(one)

    with Scripted(model, picky) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 4))
        told = uplink.ask(0, (1, 2, 3), 30.0)
        assert (told.accepted, told.token) == (1, 5)
        uplink.back(2)
        uplink.push(2, rows_of(2, 1))
        assert uplink.ask(2, None, 30.0).token == 7
        uplink.close()
    assert cloud.positions == [0, 1, 2, 3, 2]


def test_a_cloud_of_another_model_is_never_asked(model: Cut, tmp_path: Path) -> None:
    other = cut_model(tmp_path, seed=3)
    with Scripted(other, obliging) as cloud:
        uplink = model.uplink(cloud.address)
        until(lambda: isinstance(uplink.trouble, ModelError))
        assert not uplink.usable
        uplink.close()
    assert not cloud.asked


def test_what_is_in_flight_is_bounded(model: Cut) -> None:
    """Nothing follows the first half megabyte before the cloud has said that it has it, and then the next does."""
    heard = threading.Event()

    def slow(one: wire.Asked) -> list[Told | bytes]:
        if isinstance(one, Hidden) and not len(one.rows):
            heard.wait(30)
            return [Told(0, one.session, len(cloud.positions))]
        return obliging(one)

    with Scripted(model, slow) as cloud:
        uplink = model.uplink(cloud.address)
        assert uplink.wait(30)
        uplink.begin(GREEDY)
        uplink.push(0, rows_of(0, 6000))
        until(lambda: any(isinstance(one, Hidden) and not len(one.rows) for one in cloud.asked))
        time.sleep(0.2)
        assert 1 << 19 <= uplink.sent_bytes < (1 << 19) + (1 << 17)
        heard.set()
        assert uplink.ask(5999, None, 30.0).token == 7
        uplink.close()
    assert cloud.positions == list(range(6000))


def test_strangers_are_not_let_in_and_the_cloud_is_known_by_its_certificate(model: Cut) -> None:
    certificate, key = identity()
    ticket = Ticket(certificate, "open sesame")
    with cloud_at(model.cloud, "127.0.0.1:0", ticket=ticket, key=key, kernel=KERNEL) as address:
        uplink = model.uplink(address, ticket=ticket)
        assert uplink.wait(30), uplink.trouble
        uplink.close()
        uplink = model.uplink(address, ticket=Ticket(certificate, "please"))
        until(lambda: "ticket" in str(uplink.trouble))
        uplink.close()
        uplink = model.uplink(address, ticket=Ticket(identity()[0], "open sesame"))
        until(lambda: "UNAVAILABLE" in str(uplink.trouble))
        assert not uplink.usable
        uplink.close()


def test_nothing_waits_without_a_cloud(model: Cut) -> None:
    uplink = model.uplink("127.0.0.1:1")
    uplink.begin(GREEDY)
    uplink.push(0, rows_of(0, 3))
    with pytest.raises(AddressError, match="not asked"):
        uplink.ask(2, None, 60.0)
    uplink.close()
    uplink.close()
    with pytest.raises(AddressError, match="no address"):
        model.uplink("nowhere")
