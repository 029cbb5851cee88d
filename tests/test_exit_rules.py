"""When an exit answers: what the scores are, and that a threshold of 1 is the full model."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedge.core.errors import DataError, ExperimentError
from fedge.edge.exits import rules

LOGITS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(2, 6)),
    elements=st.floats(-200, 200, width=32),
)
SAME = arrays.arrays(np.float32, (3, 4, 5), elements=st.floats(-50, 50, width=32))  # exits, samples, classes
KINDS = st.sampled_from(list(rules.RULES))


def test_confidence_is_the_largest_probability() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]))
    assert rules.confidence(logits) == pytest.approx([0.7, 0.5])
    squares = np.array([0.49, 0.04, 0.01])
    assert rules.confidence(logits, 0.5)[0] == pytest.approx(0.49 / squares.sum())


def test_entropy_is_branchynets_turned_round() -> None:
    chances = np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    entropy = -(chances * np.log(chances)).sum(axis=1)
    assert rules.certainty(np.log(chances)) == pytest.approx(1 - entropy / math.log(3))
    for nats in (0.3, 0.9):
        left = rules.decide("entropy", [np.log(chances)], 1.0, 1 - nats / math.log(3))
        assert left.tolist() == (entropy <= nats).tolist()


def test_patience_counts_exits_in_a_row() -> None:
    one, two = np.array([[9.0, 0.0]]), np.array([[0.0, 9.0]])
    histories = ([two], [one, two], [two, two], [two, one, two], [one, two, two], [two, two, two])
    assert [rules.agreement(history)[0] for history in histories] == [0, 0, 0.5, 0, 0.5, 1 - 1 / 3]
    for exits, wanted in ((1, True), (2, True), (3, False)):
        assert rules.decide("patience", [one, two, two], 1.0, 1 - 1 / exits).tolist() == [wanted]


@given(logits=LOGITS, rule=KINDS, heat=st.floats(0.05, 20))
def test_every_score_lies_between_0_and_1_and_0_always_leaves(logits: np.ndarray, rule: str, heat: float) -> None:
    score = rules.scores(rule, [logits], heat)
    assert score.shape == (len(logits),)
    assert ((score >= 0) & (score <= 1)).all()
    assert rules.decide(rule, [logits], heat, 0.0).all()


@given(rule=KINDS, gap=st.floats(0, 1e4), heat=st.floats(0.05, 20))
def test_at_threshold_1_nobody_leaves_however_sure(rule: str, gap: float, heat: float) -> None:
    logits = np.array([[gap, 0.0, 0.0]], np.float32)
    assert not rules.decide(rule, [logits] * 5, heat, 1.0).any()


def test_a_probability_of_1_does_leave_below_threshold_1() -> None:
    logits = np.array([[1000.0, 0.0]], np.float32)
    assert rules.confidence(logits)[0] == 1.0
    assert rules.decide("confidence", [logits], 1.0, np.nextafter(1.0, 0.0)).all()


@given(history=SAME, rule=KINDS, bars=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_higher_threshold_lets_nobody_more_leave(history: np.ndarray, rule: str, bars: tuple[float, float]) -> None:
    low, high = (rules.decide(rule, list(history), 1.0, bar) for bar in sorted(bars))
    assert not (high & ~low).any()


@given(logits=LOGITS, heat=st.floats(0.05, 20))
def test_temperature_never_changes_the_class(logits: np.ndarray, heat: float) -> None:
    chances = rules.probabilities(logits, heat)
    named = logits.argmax(axis=1)
    assert (chances[np.arange(len(logits)), named] == chances.max(axis=1)).all()


def test_a_class_that_is_ruled_out_is_no_fault() -> None:
    logits = np.array([[1.0, 1.0, -np.inf]])
    assert rules.confidence(logits) == pytest.approx([0.5])
    assert rules.certainty(logits) == pytest.approx([1 - math.log(2) / math.log(3)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", list(rules.RULES))
def test_logits_that_are_no_numbers_are_refused(bad: float, rule: str) -> None:
    with pytest.raises(DataError, match="NaN or infinite"):
        rules.decide(rule, [np.array([[0.0, bad]])], 1.0, 0.5)


@pytest.mark.parametrize("shape", [(3, 1), (3,), (1, 2, 2)])
def test_logits_of_no_choice_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="two classes"):
        rules.decide("confidence", [np.zeros(shape)], 1.0, 0.5)


@pytest.mark.parametrize("threshold", [-0.01, 1.01, math.nan, math.inf])
def test_a_threshold_outside_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ExperimentError, match="threshold"):
        rules.decide("confidence", [np.zeros((1, 2))], 1.0, threshold)


def test_other_settings_that_are_none_are_refused() -> None:
    for heat in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ExperimentError, match="temperature"):
            rules.decide("confidence", [np.zeros((1, 2))], heat, 0.5)
    with pytest.raises(ExperimentError, match="no exit rule 'hope'; use one of confidence, entropy, patience"):
        rules.decide("hope", [np.zeros((1, 2))], 1.0, 0.5)
    with pytest.raises(DataError, match="differ in shape"):
        rules.decide("patience", [np.zeros((1, 2)), np.zeros((2, 2))], 1.0, 0.5)
    with pytest.raises(DataError, match="no logits"):
        rules.decide("patience", [], 1.0, 0.5)


@pytest.mark.parametrize("rule", list(rules.RULES))
def test_an_exit_of_other_classes_before_it_changes_nothing_for_an_exit(rule: str) -> None:
    own, prefilter = np.array([[4.0, 0.0, 1.0]]), np.array([[0.0, 9.0]])
    alone = rules.scores(rule, [own, own])
    assert (rules.scores(rule, [own, prefilter, own]) == alone).all()
    assert (rules.scores(rule, [prefilter, own, own]) == alone).all()
    assert rules.decide(rule, [prefilter, own], 1.0, 0.0).all()


def test_no_sample_is_no_fault() -> None:
    assert rules.decide("entropy", [np.zeros((0, 3))], 1.0, 0.5).shape == (0,)
