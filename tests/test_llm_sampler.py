"""The sampler against its laws, and against the obvious way of computing the same."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError, ModelError
from fedge.edge.llm.engine.sampler import Sampling, logprobs, sample, uniform

LOGITS = st.lists(st.integers(-40, 40), min_size=1, max_size=40).map(lambda values: np.array(values, np.float32) / 4)
FLAT = np.zeros(6, np.float32)


def probabilities(logits, temperature=1.0):
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def reachable(logits, sampling, draws=300):
    return {sample(logits, sampling, {}, position) for position in range(draws)}


@given(LOGITS, st.integers(0, 1000))
def test_temperature_0_takes_the_lowest_of_the_likeliest(logits, position):
    best = [at for at in range(len(logits)) if logits[at] == logits.max()]
    assert sample(logits, Sampling(temperature=0), {}, position) == best[0]
    assert sample(logits, Sampling(temperature=1, top_k=1), {}, position) == best[0]
    assert sample(logits, Sampling(temperature=1e-300), {}, position) == best[0]
    assert sample(logits, Sampling(temperature=1e-4), {}, position) in best


@given(LOGITS, st.floats(0.2, 3), st.floats(0, 1), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_top_k_and_top_p_keep_the_smallest_set(logits, temperature, top_p, top_k):
    chances = probabilities(logits, temperature)
    order = sorted(range(len(logits)), key=lambda at: (-chances[at], at))[: top_k or None]
    total, mass, kept = sum(chances[order]), 0.0, set()
    for at in order:
        kept.add(at)
        mass += chances[at]
        if mass >= top_p * total * (1 + 1e-6):
            break
    drawn = reachable(logits, Sampling(temperature=temperature, top_p=top_p, top_k=top_k), 60)
    assert drawn <= kept


def test_top_p_keeps_what_it_needs_and_no_more():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert reachable(logits, Sampling(top_p=0.35)) == {1}
    assert reachable(logits, Sampling(top_p=0.65)) == {1, 3}
    assert reachable(logits, Sampling(top_p=0.85)) == {1, 3, 2}
    assert reachable(logits, Sampling(top_p=1.0)) == {0, 1, 2, 3}
    assert reachable(logits, Sampling(top_p=0.0)) == {1}


def test_top_p_reaches_into_a_long_flat_tail():
    """More than the likely ones are needed: the second, complete, sort."""
    logits = np.concatenate([[np.log(1e4)], np.zeros(30_000)]).astype(np.float32)
    drawn = reachable(logits, Sampling(top_p=0.5), 200)
    # Half of 40,000 is the first one and 10,000 of the tail, the lowest ids of it.
    assert max(drawn) <= 10_000
    assert len(drawn) > 50


def test_min_p_drops_what_is_unlikely_beside_the_likeliest():
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert reachable(logits, Sampling(min_p=0.4)) == {1, 3}
    assert reachable(logits, Sampling(min_p=0.25)) == {1, 2, 3}


@given(LOGITS, st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 100_000))
def test_a_draw_depends_on_seed_and_position_only(logits, seed, position):
    sampling = Sampling(seed=seed)
    again = sample(logits, Sampling(temperature=0.5, seed=seed + 1 if seed < 0 else seed - 1), {}, position)
    assert 0 <= again < len(logits)
    assert sample(logits, sampling, {}, position) == sample(logits.copy(), sampling, {}, position)


def test_draws_of_other_seeds_and_positions_are_others():
    drawn = [uniform(seed, position) for seed in range(40) for position in range(40)]
    assert len(set(drawn)) == 1600
    assert 0 <= min(drawn) < 0.01
    assert 0.99 < max(drawn) < 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    logits = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -3.0], np.float32)
    draws = 6000
    seen = np.bincount(
        [sample(logits, Sampling(temperature=temperature, seed=7), {}, at) for at in range(draws)], minlength=6
    )
    expected = probabilities(logits, temperature) * draws
    kept = expected > 5
    # 99.9th percentile of chi-square with 5 degrees of freedom; seed and positions are fixed.
    assert (((seen - expected) ** 2 / expected)[kept]).sum() < 20.5


def test_penalties_and_bias_follow_the_published_formula():
    greedy = {"temperature": 0.0}
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    assert sample(logits, Sampling(**greedy, presence_penalty=0.2), {0: 1}, 0) == 1
    assert sample(logits, Sampling(**greedy, presence_penalty=0.05), {0: 9}, 0) == 0
    assert sample(logits, Sampling(**greedy, frequency_penalty=0.05), {0: 3}, 0) == 1
    assert sample(logits, Sampling(**greedy, frequency_penalty=0.05), {0: 1}, 0) == 0
    assert sample(logits, Sampling(**greedy, frequency_penalty=-0.2), {1: 1}, 0) == 1
    assert sample(logits, Sampling(**greedy, logit_bias={2: 5.0, 99: 100.0}), {}, 0) == 2
    assert reachable(FLAT, Sampling(logit_bias=dict.fromkeys(range(4), -100.0))) == {4, 5}
    assert logits.tolist() == np.array([1.0, 0.9, 0.0], np.float32).tolist()


@given(LOGITS, st.integers(0, 20))
def test_logprobs_are_the_log_softmax_and_the_likeliest_come_first(logits, top):
    expected = np.log(probabilities(logits))
    told = logprobs(logits, len(logits) - 1, top)
    assert told.logprob == pytest.approx(expected[-1])
    order = sorted(range(len(logits)), key=lambda at: (-logits[at], at))[:top]
    assert [token for token, _ in told.top] == order
    assert [value for _, value in told.top] == pytest.approx(expected[order])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_in_a_sentence(bad):
    logits = np.array([0.0, bad, 1.0], np.float32)
    for sampling in (Sampling(temperature=0), Sampling(top_p=0.5)):
        with pytest.raises(ModelError, match="no numbers"):
            sample(logits, sampling, {}, 0)


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 2.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3.0},
        {"logit_bias": {1: 101.0}},
        {"logit_bias": {1: float("nan")}},
        {"seed": 1 << 64},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ExperimentError, match=next(iter(setting))):
        Sampling(**setting)
