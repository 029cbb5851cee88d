"""The link is estimated from what comes back: right in the end, quick to notice, and never nonsense."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError
from fedge.edge.plan.link import Link, LinkState, due, estimate, fail, observe, probe_bytes

MOST = 1 << 20
Truth = Callable[[int], float]


def _link(rate: float, delay_s: float, jitter_s: float = 0.0, seed: int = 0) -> Truth:
    """Seconds on the network for a message of so many bytes."""
    chance = random.Random(seed)
    return lambda size: delay_s + jitter_s * chance.random() + 8 * size / rate


def _probed(state: LinkState, truth: Truth, times: int, now: float = 0.0) -> LinkState:
    """What the session does while nothing else is sent: a probe whenever one is due."""
    for _ in range(times):
        now += state.stale_s
        assert due(state, now)
        while due(state, now):
            size = probe_bytes(state, now, MOST)
            state = observe(state, size, truth(size) + 0.005, 0.005, now)
    return state


@settings(max_examples=150, deadline=None)
@given(
    rate=st.floats(5, 9).map(lambda power: 10**power),
    delay_s=st.floats(0, 0.2),
    jitter_s=st.floats(0, 0.02),
    size=st.integers(1000, MOST),
    seed=st.integers(0, 1000),
)
def test_converges_to_what_messages_take(rate: float, delay_s: float, jitter_s: float, size: int, seed: int) -> None:
    truth = _link(rate, delay_s, jitter_s, seed)
    state = _probed(LinkState(), truth, 8)
    now = 80.0
    for _ in range(6):  # requests of one size, as a session sends them
        now += 0.5
        state = observe(state, size, truth(size) + 0.01, 0.01, now)
    link = estimate(state)
    assert link is not None
    assert delay_s <= link.rtt_s + 1e-12
    assert link.rtt_s <= delay_s + jitter_s + 8 * 64 / rate + 1e-12
    expected = delay_s + jitter_s / 2 + 8 * size / rate
    assert link.rtt_s + 8 * size / link.bandwidth_bps == pytest.approx(expected, rel=0.25, abs=1.5 * jitter_s + 1e-3)


@given(rate=st.floats(5, 8.5).map(lambda power: 10**power), delay_s=st.floats(0, 0.2))
def test_exact_where_nothing_jitters(rate: float, delay_s: float) -> None:
    link = estimate(_probed(LinkState(), _link(rate, delay_s), 8))
    assert link is not None
    assert link.bandwidth_bps == pytest.approx(rate, rel=0.15)


@given(st.data())
def test_never_negative_and_never_nan(data: st.DataObject) -> None:
    state, now = LinkState(), 0.0
    seconds = st.one_of(st.floats(), st.floats(0, 10))
    for _ in range(data.draw(st.integers(1, 12))):
        now += data.draw(st.floats(0, 100))
        size = data.draw(st.integers(0, 1 << 26))
        if data.draw(st.booleans()):
            state = observe(state, size, data.draw(seconds), data.draw(seconds), now)
        else:
            state = fail(state, size, data.draw(seconds), now)
        link = estimate(state)
        assert link is None or (0 < link.bandwidth_bps < math.inf and 0 <= link.rtt_s < math.inf)
        assert 0 <= probe_bytes(state, now, MOST) <= MOST


@pytest.mark.parametrize("jitter_s", [0.0, 0.004])
@pytest.mark.parametrize(("before", "after"), [(50e6, 0.5e6), (0.5e6, 50e6)])
def test_a_change_of_100_times_is_noticed_within_3_requests(before: float, after: float, jitter_s: float) -> None:
    state, truth = _probed(LinkState(), _link(before, 0.02, jitter_s), 5), _link(before, 0.02, jitter_s)
    for request in range(20):
        state = observe(state, 40_000, truth(40_000), 0.0, 49 + request / 10)
    truth, now = _link(after, 0.02, jitter_s), 51.0
    for request in range(1, 4):
        state = observe(state, 40_000, truth(40_000), 0.0, now + request / 10)
    link = estimate(state)
    assert link is not None
    assert after / 2 < link.bandwidth_bps < after * 2


def test_one_outlier_changes_nothing() -> None:
    state = _probed(LinkState(), _link(10e6, 0.02), 3)
    for request in range(5):
        state = observe(state, 40_000, _link(10e6, 0.02)(40_000), 0.0, 31 + request)
    before = estimate(state)
    after = estimate(observe(state, 40_000, 5.0, 0.0, 36.5))
    assert before is not None
    assert after is not None
    assert after.bandwidth_bps == pytest.approx(before.bandwidth_bps, rel=0.01)


def test_after_silence_the_first_news_counts() -> None:
    state = _probed(LinkState(), _link(50e6, 0.02), 3)
    link = estimate(observe(state, 40_000, _link(0.5e6, 0.02)(40_000), 0.0, 100.0))
    assert link is not None
    assert link.bandwidth_bps < 1e6


@given(size=st.integers(1, 1 << 20), timeout_s=st.floats(0.01, 10))
def test_a_failure_bounds_the_bandwidth_until_something_comes_through(size: int, timeout_s: float) -> None:
    state = fail(_probed(LinkState(), _link(50e6, 0.02), 3), size, timeout_s, 31.0)
    bound = estimate(state)
    assert bound is not None
    assert bound.bandwidth_bps <= size * 8 / timeout_s
    assert not due(state, 31.0 + state.stale_s / 2)
    link = estimate(observe(state, 1 << 20, _link(50e6, 0.02)(1 << 20), 0.0, 32.0))
    assert link is not None
    assert link.bandwidth_bps == pytest.approx(50e6, rel=0.15)


def test_a_ping_after_a_failure_proves_only_its_own_bytes() -> None:
    state = observe(fail(LinkState(), 10_000, 80.0, 0.0), 64, 0.0512, 0.0, 1.0)
    link = estimate(state)
    assert link is not None
    assert link.bandwidth_bps == pytest.approx(10_000)


def test_news_age_by_kind() -> None:
    state = LinkState(stale_s=5.0)
    assert due(state, 0.0)
    state = observe(state, 64, 0.02, 0.0, 0.0)
    assert due(state, 0.0)  # nothing is known of the bandwidth
    assert estimate(state) is None
    state = observe(state, 100_000, 0.1, 0.0, 1.0)
    assert not due(state, 4.9)
    assert due(state, 5.0)  # of the round trip
    assert probe_bytes(state, 5.0, MOST) == 64
    assert probe_bytes(observe(state, 64, 0.02, 0.0, 5.0), 6.0, MOST) == 125_000  # 10 Mbit/s for 0.1 s


def test_a_cloud_that_claims_more_time_than_passed_gains_nothing_absurd() -> None:
    state = observe(LinkState(), 64, 0.02, 1e9, 0.0)
    state = observe(state, 100_000, 0.1, math.nan, 0.0)
    link = estimate(state)
    assert link == Link(8e6, 0.0)


@pytest.mark.parametrize("bad", [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, -1.0), (1.0, math.inf)])
def test_what_is_no_link_is_refused(bad: tuple[float, float]) -> None:
    with pytest.raises(ExperimentError, match="bandwidth above 0"):
        Link(*bad)
    assert replace(Link(1.0, 0.0), bandwidth_bps=math.inf).rtt_s == 0.0


def test_what_drowns_in_the_jitter_of_pings_cannot_lower_the_estimate_but_more_can() -> None:
    state = LinkState()
    for rtt_s in (0.02, 0.03, 0.03):
        state = observe(state, 64, rtt_s, 0.0, 0.0)
    state = observe(state, 1_000_000, 0.02 + 0.08, 0.0, 0.0)  # 100 Mbit/s
    for request in range(5):
        state = observe(state, 10_000, 0.035, 0.0, request / 10)  # 5 Mbit/s, or chance
        state = observe(state, 10_000, 0.0201, 0.0, request / 10)  # 800 Mbit/s, or chance
    before = estimate(state)
    assert before is not None
    assert before.bandwidth_bps == pytest.approx(1e8)
    for request in range(3):
        state = observe(state, 10_000, 0.060, 0.0, 1 + request / 10)  # twice the jitter
    link = estimate(state)
    assert link is not None
    assert link.bandwidth_bps == pytest.approx(2e6)


def test_a_failure_forgets_what_was_measured_before() -> None:
    state = LinkState()
    for request in range(5):
        state = observe(state, 100_000, 0.01, 0.0, request / 10)
    state = fail(state, 100_000, 4.0, 1.0)
    link = estimate(observe(state, 100_000, 2.0, 0.0, 1.5))
    assert link is not None
    assert link.bandwidth_bps == pytest.approx(4e5)


def test_a_transfer_faster_than_any_ping_shortens_the_round_trip() -> None:
    state = observe(LinkState(), 64, 0.2, 0.0, 0.0)
    state = observe(state, 10_000, 0.03, 0.0, 1.0)
    link = estimate(state)
    assert link is not None
    assert link.rtt_s == 0.03
