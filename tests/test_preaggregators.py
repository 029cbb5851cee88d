"""Single pre-aggregators: what each draws, shortens, drops and needs. Their formulas and laws: test_gram_rules.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators.evidence import Demanding
from fedge.strategies.preaggregators.arc import AdaptiveRobustClipping
from fedge.strategies.preaggregators.basgd import Buckets
from fedge.strategies.preaggregators.bucketing import Bucketing
from fedge.strategies.preaggregators.clip import Clip
from fedge.strategies.preaggregators.nnm import NearestNeighbourMixing
from fedge.strategies.preaggregators.norm_filter import NormFilter
from tests.literal_rules import evidence, same

SAME_COUNT = [NearestNeighbourMixing(), Clip(), AdaptiveRobustClipping()]

each_pre = pytest.mark.parametrize("pre", [*SAME_COUNT, Bucketing(), Buckets(5)], ids=lambda pre: type(pre).__name__)
many = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32)


def test_bucketing_draws_anew_with_every_seed_and_alike_with_the_same():
    rows = np.random.default_rng(8).standard_normal((9, 4))
    drawn = {seed: Bucketing(2).mix(evidence(rows, seed=seed))[0] for seed in range(5)}
    assert np.array_equal(drawn[3], Bucketing(2).mix(evidence(rows, seed=3))[0])
    assert len({matrix.tobytes() for matrix in drawn.values()}) == 5
    for matrix in drawn.values():
        assert sorted((matrix > 0).sum(axis=1).tolist()) == [1, 2, 2, 2, 2]
        assert ((matrix > 0).sum(axis=0) == 1).all()


def test_any_two_rows_share_a_bucket_as_often_as_chance_has_it():
    rows = np.eye(6)
    together = np.zeros((6, 6))
    for seed in range(600):
        matrix = Bucketing(2).mix(evidence(rows, seed=seed))[0] > 0
        together += matrix.T.astype(float) @ matrix
    apart = together[np.triu_indices(6, 1)] / 600
    assert apart.min() > 0.13  # 1 in 5 each, with a standard deviation of 0.016
    assert apart.max() < 0.27


@pytest.mark.parametrize("pre", [Bucketing(1), Buckets(40)], ids=["bucketing", "basgd"])
def test_buckets_of_one_row_leave_the_rows_and_their_names_where_they_are(pre):
    """Evidence keeps the names of as many rows as came in, so each row must still be its client's."""
    names = [f"client-{index}" for index in (7, 31, 2, 19, 20)]
    seen = evidence(np.random.default_rng(9).standard_normal((5, 3)), names=names, weights=[1, 2, 3, 4, 5])
    matrix, weights = pre.mix(seen)
    assert np.array_equal(matrix, np.eye(5))
    assert np.array_equal(weights, seen.weights)


@each_pre
def test_rows_without_weight_do_not_divide_by_it(pre):
    rows = np.random.default_rng(10).standard_normal((10, 4))
    weights = np.array([1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    matrix, shares = pre.mix(evidence(rows, 1, weights))
    assert np.isfinite(matrix).all()
    same(shares.sum(), 1.0)
    if isinstance(pre, Buckets):
        assert np.array_equal(shares, [1, 0, 0, 0, 0])
        same(matrix[1], np.eye(10)[1] / 2 + np.eye(10)[6] / 2)


def test_clipping_leaves_short_rows_alone_and_shortens_the_others_to_the_bound():
    rows = np.diag([1.0, 2.0, 3.0, 4.0, 1e15])
    assert np.array_equal(np.diag(Clip().mix(evidence(rows))[0]), [1, 1, 1, 3 / 4, 3e-15])
    assert np.array_equal(np.diag(Clip(2.0).mix(evidence(rows))[0]), [1, 1, 1, 1, 6e-15])
    # f = 1 of 5: k = floor(8 / 5) = 1; f = 2 of 5: k = floor(12 / 5) = 2
    assert np.array_equal(np.diag(AdaptiveRobustClipping().mix(evidence(rows, 1))[0]), [1, 1, 1, 1, 4e-15])
    assert np.array_equal(np.diag(AdaptiveRobustClipping().mix(evidence(rows, 2))[0]), [1, 1, 1, 3 / 4, 3e-15])


def test_a_median_norm_of_zero_clips_everything_to_zero():
    rows = np.zeros((5, 3))
    rows[0] = 1e15
    for pre in (Clip(), AdaptiveRobustClipping()):
        assert not (pre.mix(evidence(rows, 1))[0] @ rows).any()


@many
@given(f=st.integers(1, 4), sends=st.integers(1, 20), seed=seeds)
def test_f_clients_reach_at_most_f_buckets_however_often_they_send(f, sends, seed):
    pre, random = Buckets(10), np.random.default_rng(seed)
    hostile = [f"client-{number}" for number in random.choice(1000, f, replace=False)]
    names = [*hostile * sends, *(f"client-{number}" for number in range(2000, 2010))]
    rows = np.zeros((len(names), 1))
    rows[: f * sends] = 1.0
    matrix, _ = pre.mix(evidence(rows, f, names=names))
    assert len(matrix) == 10
    assert (matrix @ rows > 0).sum() <= f


def test_a_client_s_bucket_depends_on_its_name_alone():
    pre = Buckets(10)
    assert [pre.bucket(name) for name in ("client-3", "site 13", "0000023", "a5b3")] == [3, 3, 3, 3]
    assert pre.bucket("client-" + "9" * 10_000) == 9
    words = [f"{word}-{letter}" for word in ("phone", "tablet", "car") for letter in "abcdefghijklmnopqrstuvwxyz"]
    found = [pre.bucket(word) for word in words]
    assert found == [Buckets(10).bucket(word) for word in words]
    assert set(found) == set(range(10))
    assert pre.bucket("phone-a") == 5  # as on every machine, and in every version


def test_empty_buckets_are_missed():
    pre = Buckets(4)
    assert isinstance(pre, Demanding)
    assert not any(isinstance(other, Demanding) for other in SAME_COUNT)
    assert pre.lacks([]) == "updates for 4 of 4 buckets"
    assert pre.lacks(["c-1", "c-5", "c-2"]) == "updates for 2 of 4 buckets"
    assert pre.lacks([f"c-{number}" for number in (0, 1, 2, 3)]) == ""


def test_rows_that_are_far_too_long_are_left_out_the_f_longest_at_most():
    rows = np.diag([1.0, 2.0, 3.0, 4.0, 90.0, 80.0, 100.0])
    for f, kept in ((0, [0, 1, 2, 3, 4, 5, 6]), (1, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 2, 3, 5]), (3, [0, 1, 2, 3])):
        matrix, weights = NormFilter().mix(evidence(rows, f))
        assert np.array_equal(matrix, np.eye(7)[kept])
        np.testing.assert_allclose(weights, 1 / len(kept))
    assert len(NormFilter(30.0).mix(evidence(rows, 3))[0]) == 7


def test_the_norm_filter_may_drop_f_honest_rows_and_asks_for_as_many_more():
    assert [NormFilter().least(2 * f + 1, f) for f in (0, 1, 4)] == [1, 4, 13]
    with pytest.raises(ExperimentError, match="at least 1"):
        NormFilter(0.5)
