"""The screen: what hostile updates of the field's failures look like, one refusal each; honest ones pass untouched."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedge.core.errors import BadExamples, BadReport, NormTooLarge, NotFinite, WrongManifest
from fedge.core.limits import Limits
from fedge.core.task import Update
from fedge.strategies.screen import screen

SIZE = 8
HONEST = Update("c", "t", 0, 5, 100, {"delta": np.ones(SIZE, np.float32)}, {"compute_s": 0.5}, {"loss": 1.0})


def check(update, *, blobs=frozenset(), limits=None):
    return screen(update, SIZE, blobs, limits or Limits())


def delta(values, dtype=np.float32):
    return {"blobs": {"delta": np.array(values, dtype)}}


def poisoned(value):
    return [1.0] * (SIZE - 1) + [value]


@given(arrays.arrays(np.float32, SIZE, elements=st.floats(-1e3, 1e3, width=32)))
def test_an_honest_update_passes_with_its_norm(vector):
    before = vector.copy()
    norm = check(dataclasses.replace(HONEST, blobs={"delta": vector}))
    np.testing.assert_allclose(norm, np.linalg.norm(vector.astype(np.float64)), rtol=1e-5, atol=1e-20)
    assert np.array_equal(vector, before)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"blobs": {}}, WrongManifest),
        (delta([1.0] * (SIZE - 1)), WrongManifest),
        (delta([1.0]), WrongManifest),
        (delta([[1.0] * SIZE]), WrongManifest),
        (delta([1.0] * SIZE, np.float64), WrongManifest),
        (delta([1.0] * SIZE, ">f4"), WrongManifest),
        (delta([1] * SIZE, np.complex64), WrongManifest),
        (delta(["x"] * SIZE, np.str_), WrongManifest),
        ({"blobs": {"delta": [1.0] * SIZE}}, WrongManifest),
        ({"blobs": {**HONEST.blobs, "extra": np.ones(SIZE, np.float32)}}, WrongManifest),
        (delta(poisoned(np.nan)), NotFinite),
        (delta([np.nan] * SIZE), NotFinite),
        (delta(poisoned(np.inf)), NotFinite),
        (delta(poisoned(-np.inf)), NotFinite),
        (delta([3e38] * SIZE), NormTooLarge),  # finite, yet its square is not
        (delta(poisoned(2e8)), NormTooLarge),
        ({"examples": 0}, BadExamples),
        ({"examples": -901}, BadExamples),
        ({"examples": 10**12}, BadExamples),
        ({"examples": True}, BadExamples),
        ({"examples": float("nan")}, BadExamples),
        ({"examples": 100.0}, BadExamples),
        ({"examples": "100"}, BadExamples),
        ({"examples": None}, BadExamples),
        ({"steps": 0}, BadReport),
        ({"steps": -1}, BadReport),
        ({"steps": 1.5}, BadReport),
        ({"steps": 10**12}, BadReport),
        ({"timings": {"compute_s": -1.0}}, BadReport),
        ({"timings": {"compute_s": float("inf")}}, BadReport),
        ({"timings": {"compute_s": "1"}}, BadReport),
        ({"metrics": {"loss": float("nan")}}, BadReport),
        ({"metrics": {"loss": None}}, BadReport),
        ({"metrics": {1: 1.0}}, BadReport),
        ({"metrics": {"x" * 300: 1.0}}, BadReport),
        ({"metrics": {str(count): 1.0 for count in range(65)}}, BadReport),
    ],
)
def test_a_hostile_update_is_refused_for_its_reason(changes, error):
    with pytest.raises(error):
        check(dataclasses.replace(HONEST, **changes))


def test_further_blobs_are_those_asked_for_and_pass_the_same_checks():
    def carrying(vector):
        return dataclasses.replace(HONEST, blobs={**HONEST.blobs, "control": vector})

    asked = frozenset({"control"})
    assert check(carrying(np.ones(SIZE, np.float32)), blobs=asked) == pytest.approx(SIZE**0.5)
    for vector, error in (
        (np.ones(SIZE + 1, np.float32), WrongManifest),
        (np.full(SIZE, np.nan, np.float32), NotFinite),
        (np.full(SIZE, 1e10, np.float32), NormTooLarge),
    ):
        with pytest.raises(error, match="control"):
            check(carrying(vector), blobs=asked)
    with pytest.raises(WrongManifest, match="no blob 'control'"):
        check(HONEST, blobs=asked)
    with pytest.raises(WrongManifest, match="2 blobs"):
        check(carrying(np.ones(SIZE, np.float32)), blobs=asked, limits=Limits(max_blobs=1))


def test_the_first_fault_in_the_order_of_the_screen_is_named():
    everything = {**delta(poisoned(np.nan)), "examples": 0, "steps": 0}
    with pytest.raises(BadReport):
        check(dataclasses.replace(HONEST, **everything))
    with pytest.raises(NotFinite):
        check(dataclasses.replace(HONEST, **{**everything, "steps": 1}))
