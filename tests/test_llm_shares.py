"""Who holds what: everything is held once, in order, and no other division would let the slowest end much earlier."""

from dataclasses import replace
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError
from fedge.edge.llm.models.config import Config, Rope
from fedge.edge.llm.shards.shares import FFN_GRANULE, balanced, bytes_of, cost_of_head, costs, even, proportional

CONFIG = Config(
    "llama", 22, 2048, 5632, 32, 4, 64, 32000, 2048, 1e-5, Rope(), False, False, False, False, False, 0, None, ()
)
SPEEDS = st.lists(st.floats(0.1, 10), min_size=1, max_size=6)


@st.composite
def configs(draw):
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    return replace(
        CONFIG,
        layers=draw(st.integers(1, 4)),
        hidden=draw(st.sampled_from([32, 64, 100])),
        ffn=draw(st.integers(1, 1000)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 48, 64])),
        vocab=draw(st.sampled_from([16, 1000, 20000])),
    )


def counts(shares):
    """Key/value heads and granules of each rank."""
    return [
        (share.kv_heads[1] - share.kv_heads[0], -(-(share.ffn[1] - share.ffn[0]) // FFN_GRANULE)) for share in shares
    ]


def slowest(config, speeds, given_, head_cost=1.0):
    head, kv_head, granule = costs(config, head_cost)
    loads = [kv * kv_head + n * granule for kv, n in given_]
    loads[0] += head
    return max(load / speed for load, speed in zip(loads, speeds))


def divisions(count, ranks):
    """All ways to give `count` equal items to `ranks`."""
    for cuts in combinations_with_replacement(range(count + 1), ranks - 1):
        yield [b - a for a, b in pairwise((0, *cuts, count))]


@settings(deadline=None)
@given(configs(), SPEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_everything_is_held_once_and_in_order(config, speeds, head_cost):
    for shares in (proportional(config, speeds, head_cost), balanced(config, speeds)):
        assert_whole(config, speeds, shares)


def assert_whole(config, speeds, shares):
    assert len(shares) == len(speeds)
    for ranges, end in (([s.kv_heads for s in shares], config.kv_heads), ([s.ffn for s in shares], config.ffn)):
        assert ranges[0][0] == 0
        assert ranges[-1][1] == end
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert all(start <= stop for start, stop in ranges)
    assert all(share.ffn[0] % FFN_GRANULE == 0 or share.ffn[0] == config.ffn for share in shares)


@settings(deadline=None, max_examples=60)
@given(configs(), st.lists(st.floats(0.1, 10), min_size=1, max_size=3), st.sampled_from([0.0, 1.0]))
def test_the_slowest_rank_ends_within_a_granule_of_the_best_division(config, speeds, head_cost):
    config = replace(config, kv_heads=min(config.kv_heads, 4), heads=min(config.kv_heads, 4), ffn=min(config.ffn, 256))
    granules, ranks = -(-config.ffn // FFN_GRANULE), len(speeds)
    best = min(
        slowest(config, speeds, list(zip(kv, ffn)), head_cost)
        for kv in divisions(config.kv_heads, ranks)
        for ffn in divisions(granules, ranks)
    )
    step = costs(config)[2] / min(speeds)
    assert slowest(config, speeds, counts(proportional(config, speeds, head_cost)), head_cost) <= (best + step) * 1.0001


@settings(deadline=None)
@given(configs(), st.integers(1, 6))
def test_even_shares_differ_by_one_of_each(config, ranks):
    for numbers in zip(*counts(even(config, ranks))):
        assert max(numbers) - min(numbers) <= 1


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 256), st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
def test_no_division_lets_ranks_that_wait_for_each_other_end_earlier(kv_heads, ffn, speeds):
    config = replace(CONFIG, heads=kv_heads, kv_heads=kv_heads, ffn=ffn)

    def waited(numbers):
        return max(number / speed for number, speed in zip(numbers, speeds))

    kv, granules = zip(*counts(balanced(config, speeds)))
    assert waited(kv) <= min(map(waited, divisions(kv_heads, len(speeds)))) * 1.0001
    assert waited(granules) <= min(map(waited, divisions(-(-ffn // FFN_GRANULE), len(speeds)))) * 1.0001


def test_the_ffn_evens_out_what_heads_cannot():
    (one, other) = counts(proportional(replace(CONFIG, heads=3, kv_heads=3), [1.0, 1.0], head_cost=0.0))
    assert (one[0], other[0]) == (2, 1)
    assert one[1] < other[1]


def test_rank_0_gets_less_of_the_layers_for_the_head_but_its_part_of_the_heads():
    shares = proportional(CONFIG, [1.0, 1.0])
    assert [kv for kv, _ in counts(shares)] == [2, 2]
    sizes = [bytes_of(CONFIG, share, "int8", rank == 0) for rank, share in enumerate(shares)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_a_head_as_large_as_the_layers_takes_rank_0_out_of_them():
    shares = proportional(replace(CONFIG, layers=1, vocab=200_000), [1.0, 1.0])
    assert counts(shares)[0] == (0, 0)


def test_bytes_follow_speeds():
    speeds = [1.0, 2.0, 4.0]
    for kind in ("float32", "int8", "int4"):
        shares = proportional(CONFIG, speeds, cost_of_head(kind))
        sizes = [bytes_of(CONFIG, share, kind, rank == 0) for rank, share in enumerate(shares)]
        for size, speed in zip(sizes, speeds):
            assert size / sum(sizes) == pytest.approx(speed / sum(speeds), rel=0.03)


def test_there_may_be_more_ranks_than_heads_or_granules():
    given_ = counts(even(replace(CONFIG, heads=2, kv_heads=2, ffn=64), 6))
    assert sum(kv for kv, _ in given_) == 2
    assert sum(n for _, n in given_) == 2


@pytest.mark.parametrize("speeds", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_speeds_that_are_none_are_refused(speeds):
    for divide in (proportional, balanced):
        with pytest.raises(ExperimentError, match="positive"):
            divide(CONFIG, speeds)
