"""The number of ranks and their shares against the formula written out by hand, and the laws it obeys."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ModelError
from fedge.edge.llm.models.config import Config, Rope
from fedge.edge.llm.shards.planner import Device, kv_bytes, plan
from fedge.edge.llm.shards.shares import Share
from fedge.edge.plan.link import Link

TINY_LLAMA = Config(
    "llama", 22, 2048, 5632, 32, 4, 64, 32000, 2048, 1e-5, Rope(), False, False, False, False, False, 0, 1, (2,)
)
WEIGHTS = 1_034_420_224  # multiplied per token, the head included
MUCH = 64 << 30
PI = Device("pi", weights_per_s=10e9, memory_bytes=MUCH, disk_bytes_per_s=1e9)
WIRE = Link(bandwidth_bps=1e9, rtt_s=2e-4)


def test_one_device_multiplies_all_weights() -> None:
    only = plan(TINY_LLAMA, "int8", [PI], WIRE, kv_tokens=2048).choice
    assert only.token_s == pytest.approx(WEIGHTS / 10e9)
    assert only.ranks[0].streamed_bytes == 0
    assert only.exchange_s == 0


def test_two_equal_ranks_halve_the_layers_but_not_the_head() -> None:
    choice = plan(TINY_LLAMA, "int8", [PI, replace(PI, name="b")], WIRE, kv_tokens=2048).choice
    head = 32000 * 2048
    hop_s = 1e-4 + 2048 * 4 * 8 / 1e9
    assert len(choice.ranks) == 2
    assert choice.exchange_s == pytest.approx(44 * hop_s)
    assert choice.token_s == pytest.approx(((WEIGHTS - head) / 2 + head) / 10e9 + 44 * hop_s)


def test_a_slow_link_leaves_the_others_out() -> None:
    slow = Link(bandwidth_bps=1e8, rtt_s=0.02)
    found = plan(TINY_LLAMA, "int8", [PI, replace(PI, name="b"), replace(PI, name="c")], slow, kv_tokens=2048)
    assert len(found.choice.ranks) == 1
    assert [len(option.ranks) for option in found.options] == [1, 2, 3]


def test_a_device_three_times_as_fast_gets_three_quarters() -> None:
    fast = replace(PI, name="laptop", weights_per_s=30e9)
    ranks = plan(TINY_LLAMA, "int8", [PI, fast], WIRE, kv_tokens=2048).choice.ranks
    assert [rank.share for rank in ranks] == [Share((0, 1), (0, 1408)), Share((1, 4), (1408, 5632))]


def test_what_does_not_fit_is_streamed_and_sets_the_pace() -> None:
    small = replace(PI, memory_bytes=500 << 20, disk_bytes_per_s=1e8)
    only = plan(TINY_LLAMA, "int8", [small], WIRE, kv_tokens=512).choice
    (rank,) = only.ranks
    assert rank.bytes - rank.streamed_bytes <= 500 << 20
    assert only.token_s == pytest.approx(rank.streamed_bytes / 1e8)
    assert not rank.steady


def test_a_second_device_with_memory_is_worth_a_slow_link() -> None:
    small = replace(PI, memory_bytes=600 << 20, disk_bytes_per_s=1e8)
    link = Link(bandwidth_bps=1e8, rtt_s=0.01)
    choice = plan(TINY_LLAMA, "int8", [small, replace(small, name="b")], link, kv_tokens=512).choice
    assert len(choice.ranks) == 2
    assert all(rank.steady for rank in choice.ranks)


def test_memory_for_less_than_two_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="allow more"):
        plan(TINY_LLAMA, "float32", [replace(PI, memory_bytes=100 << 20)], WIRE, kv_tokens=2048)


def test_keys_and_values_of_a_token() -> None:
    assert kv_bytes(TINY_LLAMA, Share((0, 4), (0, 0)), 1) == 22 * 2 * 4 * 64 * 4


devices = st.builds(
    Device,
    st.text(max_size=3),
    weights_per_s=st.floats(1e9, 1e11),
    memory_bytes=st.integers(200 << 20, 1 << 30),
    disk_bytes_per_s=st.floats(1e7, 5e9),
    layer_s=st.floats(0, 1e-3),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(devices, min_size=1, max_size=4), st.floats(0, 0.05), st.floats(1e6, 1e10))
def test_the_choice_is_the_soonest_and_shares_are_whole(group: list[Device], rtt_s: float, rate: float) -> None:
    config = replace(TINY_LLAMA, layers=4)
    found = plan(config, "int8", group, Link(rate, rtt_s), kv_tokens=512)
    assert found.choice.token_s == min(option.token_s for option in found.options)
    for option in found.options:
        assert option.ranks[0].device == group[0]
        assert [rank.share.kv_heads[0] for rank in option.ranks[1:]] == [r.share.kv_heads[1] for r in option.ranks[:-1]]
        assert option.ranks[-1].share.kv_heads[1] == 4
        assert option.ranks[-1].share.ffn[1] == 5632
        for rank in option.ranks:
            kept = rank.bytes - rank.streamed_bytes + kv_bytes(config, rank.share, 512)
            assert kept <= rank.device.memory_bytes
            assert option.token_s >= rank.stream_s
            assert rank.steady or option.token_s == max(one.stream_s for one in option.ranks)
