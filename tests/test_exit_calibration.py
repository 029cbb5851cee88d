"""Temperatures, calibration errors and thresholds, on logits whose truth is known."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import DataError, ExperimentError
from fedge.edge.bundle import Exit, Tensor
from fedge.edge.exits.calibrate import (
    COLDEST,
    calibration_error,
    choose_thresholds,
    evaluate,
    loss_bound,
    temperature,
)
from fedge.edge.exits.rules import RULES

WORK = [1.0, 2.0, 4.0]


def drawn(n: int, seed: int, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from their own softmax: calibrated by construction."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (n, classes))
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, labels


def cascade(n: int, seed: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Two exits and a final output that see the class through ever less noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, n)
    clean = 4.0 * np.eye(4)[labels]
    one, two, final = (clean + random.normal(0, noise, clean.shape) for noise in (3.0, 2.0, 0.8))
    return [one, two], final, labels


def settings_of(**changed: Any) -> dict[str, Any]:
    return {"temperatures": [1.0, 1.0], "work": WORK, **changed}


@pytest.mark.parametrize("heat", [0.3, 1.0, 4.0])
def test_the_temperature_is_found_again(heat: float) -> None:
    logits, labels = drawn(20_000, 1)
    assert temperature(heat * logits, labels) == pytest.approx(heat, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), heat=st.floats(0.2, 5))
def test_no_other_temperature_is_likelier(seed: int, heat: float) -> None:
    logits, labels = drawn(50, seed, 3)
    random = np.random.default_rng(seed)
    labels = np.where(random.random(50) < 0.3, random.integers(0, 3, 50), labels)

    def cost(at: float) -> float:
        scaled = logits / at
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(50), labels]).mean())

    assert cost(temperature(logits, labels)) <= cost(heat) + 1e-9


def test_certain_and_hopeless_logits_have_a_finite_temperature() -> None:
    sure = 50.0 * np.eye(3)
    assert COLDEST <= temperature(sure, np.arange(3)) < 2  # to the last bit, all below are as likely
    assert temperature(sure / 50, np.arange(3)) < 0.06
    assert temperature(sure, (np.arange(3) + 1) % 3) == pytest.approx(20, rel=0.01)
    assert temperature(np.array([[0.0, -np.inf]]), np.array([1])) > 0


def test_what_is_calibrated_has_no_calibration_error() -> None:
    logits, labels = drawn(50_000, 2)
    assert calibration_error(logits, labels) < 0.01
    assert calibration_error(3 * logits, labels) > 0.05
    assert calibration_error(3 * logits, labels, 3.0) < 0.01


def test_the_calibration_error_is_the_mean_gap_over_bins() -> None:
    chances = np.array([[0.9, 0.1], [0.88, 0.12], [0.6, 0.4], [0.59, 0.41]])  # bins (.867, .933] and (.533, .6]
    found = calibration_error(np.log(chances), np.array([0, 1, 0, 0]))
    assert found == pytest.approx(0.5 * abs(0.89 - 0.5) + 0.5 * abs(0.595 - 1.0))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rule=st.sampled_from(list(RULES)))
def test_thresholds_of_1_are_the_full_model(seed: int, rule: str) -> None:
    exits, final, labels = cascade(30, seed)
    exits = [100 * one for one in exits]  # many probabilities are 1 to the last bit
    found = evaluate(exits, final, labels, rule=rule, thresholds=[1.0, 1.0], **settings_of())
    assert found.agreement == 1.0
    assert found.accuracy == (final.argmax(axis=1) == labels).mean()
    assert found.work == WORK[-1]
    assert [one.share for one in found.leaving] == [0, 0, 1]


def test_the_outcome_is_what_counting_by_hand_gives() -> None:
    exits = [np.array([[5.0, 0], [0, 1], [0, 1], [0.1, 0]]), np.array([[5.0, 0], [0, 5], [1, 0], [0.1, 0]])]
    final, labels = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]]), np.array([0, 1, 0, 0])
    found = evaluate(exits, final, labels, rule="confidence", thresholds=[0.9, 0.7], **settings_of())
    assert [one.share for one in found.leaving] == [0.25, 0.5, 0.25]
    assert [one.accuracy for one in found.leaving] == [1, 1, 0]
    assert [one.final_accuracy for one in found.leaving] == [1, 0.5, 0]
    assert [one.agreement for one in found.leaving] == [1, 0.5, 1]
    assert (found.accuracy, found.agreement, found.work) == (0.75, 0.75, (1 + 2 + 2 + 4) / 4)
    blind = evaluate(exits, final, None, rule="confidence", thresholds=[0.9, 0.7], **settings_of())
    assert (blind.accuracy, blind.leaving[0].accuracy, blind.agreement) == (None, None, 0.75)


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("labelled", [True, False])
def test_the_goal_holds_where_thresholds_were_chosen_and_on_new_samples(rule: str, labelled: bool) -> None:
    exits, final, labels = cascade(4000, 3)
    given = labels if labelled else None
    full = (final.argmax(axis=1) == labels).mean() if labelled else 1.0
    chosen = choose_thresholds(exits, final, given, wanted=full - 0.05, rule=rule, **settings_of())
    reached = chosen.outcome.accuracy if labelled else chosen.outcome.agreement
    assert reached is not None
    assert full - 0.05 <= reached
    if rule != "patience":
        assert chosen.outcome.work < 3.4
    exits, final, labels = cascade(4000, 4)
    bars = {"thresholds": chosen.thresholds, "rule": rule}
    found = evaluate(exits, final, labels if labelled else None, **settings_of(**bars))
    full = (final.argmax(axis=1) == labels).mean() if labelled else 1.0
    again = found.accuracy if labelled else found.agreement
    assert again is not None
    assert again >= full - 0.05


@pytest.mark.parametrize("rule", ["confidence", "entropy"])
def test_a_laxer_goal_never_costs_more_work(rule: str) -> None:
    exits, final, _ = cascade(2000, 5)
    spent = [
        choose_thresholds(exits, final, None, wanted=wanted, rule=rule, **settings_of()).outcome.work
        for wanted in (1.0, 0.98, 0.95, 0.9, 0.8, 0.0)
    ]
    assert all(now >= then - 1e-12 for now, then in itertools.pairwise(spent))
    assert spent[0] == WORK[-1]
    assert spent[-1] == WORK[0]


def test_the_choice_comes_close_to_the_best_of_all() -> None:
    """Against every pair of thresholds out of a fine grid, under the same cautious goal."""
    exits, final, _ = cascade(1500, 6)
    chosen = choose_thresholds(exits, final, None, wanted=0.9, **settings_of())
    best = WORK[-1]
    for bars in itertools.product(np.linspace(0.3, 1, 36), repeat=2):
        found = evaluate(exits, final, None, rule="confidence", thresholds=list(bars), **settings_of())
        lost = np.repeat([1.0, 0.0], [round(1500 * (1 - found.agreement)), round(1500 * found.agreement)])
        if loss_bound(lost) <= 0.1:
            best = min(best, found.work)
    assert chosen.outcome.work <= best + 0.1


def test_few_samples_prove_nothing() -> None:
    """Exits that agree with the output throughout: 100 samples do not vouch for 99 %, 1000 do."""
    for n, work in ((100, 4.0), (1000, 1.0)):
        _, final, _ = cascade(n, 7)
        chosen = choose_thresholds([final, final], final, None, wanted=0.99, **settings_of())
        assert chosen.outcome.work == work


def test_the_bound_of_the_loss() -> None:
    assert loss_bound(np.zeros(100)) == pytest.approx(1.645**2 / 100)
    p, n, z = 0.1, 400, 1.645  # Wilson's centre and width, their common factor 1 / (1 + z^2 / n) left out
    lost = np.repeat([1.0, 0.0], [40, 360])
    assert loss_bound(lost) == pytest.approx(p + z**2 / (2 * n) + z * np.sqrt(p / n + z**2 / (4 * n**2)))


def test_the_settings_go_into_the_bundles_exits() -> None:
    exits, final, labels = cascade(2000, 8)
    chosen = choose_thresholds(exits, final, labels, wanted=0.8, temperatures=[1.5, 2.0], work=WORK)
    named = [Exit(name, name, Tensor(name, "float32", (-1, 4))) for name in ("a", "b")]
    put = chosen.put(named)
    assert [(one.name, one.temperature, one.threshold) for one in put] == [
        ("a", 1.5, chosen.thresholds[0]),
        ("b", 2.0, chosen.thresholds[1]),
    ]
    assert [(one.share, one.accuracy, one.final_accuracy) for one in put] == [
        (left.share, left.accuracy, left.final_accuracy) for left in chosen.outcome.leaving[:2]
    ]
    blind = choose_thresholds(exits, final, None, wanted=0.9, temperatures=[1.5, 2.0], work=WORK)
    assert [(one.accuracy, one.final_accuracy) for one in blind.put(named)] == [
        (left.agreement, 1.0) for left in blind.outcome.leaving[:2]
    ]
    with pytest.raises(DataError, match="2 exits were calibrated, the bundle has 1"):
        chosen.put(named[:1])


BAD: list[tuple[str, dict[str, Any]]] = [
    ("empty", {"exits": [np.zeros((0, 4))] * 2, "final": np.zeros((0, 4)), "labels": np.zeros(0, np.int64)}),
    ("same samples", {"exits": [np.zeros((9, 4))] * 2}),
    ("one exit or more", {"exits": []}),
    ("NaN", {"final": np.full((10, 4), np.nan)}),
    ("whole numbers", {"labels": np.zeros(10)}),
    ("whole numbers", {"labels": np.zeros(9, np.int64)}),
    ("from -1", {"labels": np.full(10, -1)}),
    ("to 4", {"labels": np.full(10, 4)}),
    ("1 temperatures", {"temperatures": [1.0]}),
    ("figures of work", {"work": [1.0, 2.0]}),
]


@pytest.mark.parametrize(("words", "changed"), BAD, ids=[words for words, _ in BAD])
def test_data_that_do_not_fit_are_refused_in_one_sentence(words: str, changed: dict[str, Any]) -> None:
    good = {"exits": [np.zeros((10, 4))] * 2, "final": np.zeros((10, 4)), "labels": np.zeros(10, np.int64)}
    whole = {**good, **settings_of(), "wanted": 0.5, **changed}
    with pytest.raises(DataError, match=words) as caught:
        choose_thresholds(whole.pop("exits"), whole.pop("final"), whole.pop("labels"), **whole)
    assert "\n" not in str(caught.value)


def test_a_goal_that_cannot_be_had_is_refused() -> None:
    exits, final, labels = cascade(200, 9)
    labels = (labels + (np.arange(200) < 100)) % 4
    with pytest.raises(ExperimentError, match="cannot be had"):
        choose_thresholds(exits, final, labels, wanted=0.9, **settings_of())
    for wanted in (-0.1, 1.1, np.nan):
        with pytest.raises(ExperimentError, match="goal"):
            choose_thresholds(exits, final, None, wanted=wanted, **settings_of())
