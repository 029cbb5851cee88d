"""Weighers: shares that no claim can blow up, discounts that never rise, and FedNova's local work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError
from fedge.strategies.contracts import Arrival
from fedge.strategies.weighers import STALENESS, WEIGHERS
from fedge.strategies.weighers.fednova import local_work

DISCOUNTS = [
    {"kind": "constant"},
    {"kind": "polynomial"},
    {"kind": "polynomial", "exponent": 2.0},
    {"kind": "hinge"},
    {"kind": "hinge", "a": 0.5, "b": 0},
]


def arrival(*, staleness=0, examples=100, steps=10):
    return Arrival("c", "t", 0, staleness, steps, steps, examples, 1.0, 1.0)


@given(st.sampled_from(DISCOUNTS), st.integers(0, 100_000), st.integers(0, 1000))
def test_a_discount_is_one_when_fresh_never_rises_and_stays_above_zero(settings, tau, more):
    weigher = STALENESS.build(settings)
    assert weigher.weigh(arrival(staleness=0)) == 1.0
    assert 0.0 < weigher.weigh(arrival(staleness=tau + more)) <= weigher.weigh(arrival(staleness=tau)) <= 1.0


def test_discounts_have_the_published_values():
    assert STALENESS.build({"kind": "polynomial"}).weigh(arrival(staleness=3)) == 0.5
    hinge = STALENESS.build({"kind": "hinge"})
    assert hinge.weigh(arrival(staleness=4)) == 1.0
    assert hinge.weigh(arrival(staleness=6)) == 1 / 21
    assert STALENESS.build({"kind": "constant"}).weigh(arrival(staleness=9)) == 1.0


@given(st.integers(1, 10**12))
def test_shares_are_positive_and_capped(examples):
    assert WEIGHERS.build({"kind": "equal"}).weigh(arrival(examples=examples)) == 1.0
    weight = WEIGHERS.build({"kind": "examples", "cap": 500}).weigh(arrival(examples=examples))
    assert weight == min(examples, 500)
    assert WEIGHERS.build({"kind": "examples"}).weigh(arrival(examples=examples)) <= 10_000


@given(st.integers(1, 60), st.floats(0.0, 0.99))
def test_local_work_is_the_sum_of_the_coefficients_of_each_gradient(steps, momentum):
    # The gradient of step k is in the velocity of that step and, fading, of all later ones.
    coefficients = [sum(momentum**age for age in range(steps - k)) for k in range(steps)]
    np.testing.assert_allclose(local_work(steps, momentum), sum(coefficients), rtol=1e-8)


def test_fednova_divides_the_share_by_the_work():
    assert WEIGHERS.build({"kind": "fednova"}).weigh(arrival(examples=100, steps=20)) == 5.0
    capped = WEIGHERS.build({"kind": "fednova", "cap": 10, "momentum": 0.5}).weigh(arrival(examples=100, steps=1))
    assert capped == 10.0


@pytest.mark.parametrize(
    ("registry", "settings"),
    [
        (WEIGHERS, {"kind": "examples", "cap": 0}),
        (WEIGHERS, {"kind": "fednova", "momentum": 1.0}),
        (STALENESS, {"kind": "polynomial", "exponent": -0.5}),
        (STALENESS, {"kind": "hinge", "a": -1.0}),
        (STALENESS, {"kind": "hinge", "b": -1}),
    ],
)
def test_bad_settings_are_refused_by_name(registry, settings):
    with pytest.raises(ExperimentError, match="must be"):
        registry.build(settings)
