"""Sums over ranks: the same bits on all of them, in the order that is documented."""

from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.edge.llm.mesh.collectives import BLOCK, choose, decode, encode, seconds
from fedge.edge.llm.mesh.mesh import Mesh
from tests.llm_group import group

Sum = Callable[[list[Array]], Array]


def in_rank_order(parts: list[Array]) -> Array:
    return reduce(np.add, parts)


def neighbours_first(parts: list[Array]) -> Array:
    """The documented tree: the first pairs beyond a power of two, then halves."""
    power = 1 << (len(parts).bit_length() - 1)
    extra = len(parts) - power
    parts = [parts[2 * at] + parts[2 * at + 1] for at in range(extra)] + parts[2 * extra :]
    while len(parts) > 1:
        parts = [parts[at] + parts[at + 1] for at in range(0, len(parts), 2)]
    return parts[0]


def rounded(parts: list[Array]) -> Array:
    """Blocks of 32, one scale each, the slow way."""
    coarse = []
    for part in parts:
        flat = part.reshape(-1).copy()
        for at in range(0, flat.size, BLOCK):
            block = flat[at : at + BLOCK]
            most = np.abs(block).max()
            steps = np.rint(block * (np.float32(127) / most)) if most > 0 else np.zeros_like(block)
            flat[at : at + BLOCK] = steps * (most / np.float32(127))
        coarse.append(flat.reshape(part.shape))
    return in_rank_order(coarse)


SUMS: dict[str, Sum] = {"full": in_rank_order, "star": in_rank_order, "doubling": neighbours_first, "int8": rounded}


def partial(rank: int, round_: int, shape: tuple[int, ...]) -> Array:
    made = np.random.default_rng([rank, round_]).standard_normal(shape, np.float32)
    return made * np.float32(10.0) ** (rank - 1)  # so that another order gives other bits


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_all_ranks_hold_the_bits_of_the_documented_sum(size: int, name: str) -> None:
    shapes = [(1, 64), (3, 33), (2, 5, 7), (1,), (), (4, 40_000)]

    def work(mesh: Mesh) -> list[Array]:
        return [mesh.allreduce(partial(mesh.rank, at, shape)) for at, shape in enumerate(shapes)]

    results = group(size, work, collective=name)
    for at, shape in enumerate(shapes):
        expected = SUMS[name]([partial(rank, at, shape) for rank in range(size)])
        for result in results:
            assert isinstance(result, list), result
            assert result[at].shape == shape
            np.testing.assert_array_equal(result[at], expected)


def test_the_orders_are_told_apart_by_these_parts() -> None:
    parts = [partial(rank, 0, (1, 64)) for rank in range(5)]
    assert (in_rank_order(parts) != neighbours_first(parts)).any()
    assert (in_rank_order(parts) != in_rank_order(parts[::-1])).any()


@settings(max_examples=15, deadline=None)
@given(
    size=st.integers(2, 5),
    name=st.sampled_from(sorted(SUMS)),
    shape=arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=40),
)
def test_any_shape_is_summed_and_overwritten_in_place(size: int, name: str, shape: tuple[int, ...]) -> None:
    def work(mesh: Mesh) -> tuple[bool, Array]:
        x = partial(mesh.rank, 1, shape)
        total = mesh.allreduce(x)
        return total is x, total

    expected = SUMS[name]([partial(rank, 1, shape) for rank in range(size)])
    for result in group(size, work, collective=name):
        assert isinstance(result, tuple), result
        assert result[0]
        np.testing.assert_array_equal(result[1], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.astype(np.float64),
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: np.broadcast_to(x[:1], x.shape),
    ],
    ids=["float64", "fortran", "strided", "read-only"],
)
def test_what_cannot_be_overwritten_is_summed_into_a_new_array(make: Callable[[Array], Array]) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    results = group(2, lambda mesh: mesh.allreduce(make(x)), collective="full")
    for result in results:
        assert isinstance(result, np.ndarray), result
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, 2 * make(x))


def test_only_large_parts_are_rounded_to_8_bits() -> None:
    shapes = [(1, 64), (2, 64)]

    def work(mesh: Mesh) -> list[Array]:
        return [mesh.allreduce(partial(mesh.rank, 2, shape)) for shape in shapes]

    for result in group(3, work, collective="int8", exact_bytes=256):
        assert isinstance(result, list), result
        for total, shape, expected in zip(result, shapes, (in_rank_order, rounded)):
            np.testing.assert_array_equal(total, expected([partial(rank, 2, shape) for rank in range(3)]))


def test_the_documented_error_of_8_bits() -> None:
    parts = [np.random.default_rng(rank).standard_normal((64, 1024), np.float32) for rank in range(4)]
    exact = in_rank_order(parts)
    error = np.linalg.norm(rounded(parts) - exact) / np.linalg.norm(exact)
    assert 0.004 < error < 0.008


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 100), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_a_value_is_off_by_at_most_half_a_step_of_its_block(x: Array) -> None:
    back = decode(encode(x), x.size)
    for at in range(0, x.size, BLOCK):
        most = float(np.abs(x[at : at + BLOCK]).max())
        off = np.abs(back[at : at + BLOCK].astype(np.float64) - x[at : at + BLOCK])
        assert off.max() <= most / 254 * 1.001 + 1e-30


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_8_bits_hide_no_value_that_is_not_finite(bad: float) -> None:
    x = np.ones(3 * BLOCK, np.float32)
    x[BLOCK + 3] = bad
    back = decode(encode(x), x.size)
    assert not np.isfinite(back[BLOCK : 2 * BLOCK]).any()
    np.testing.assert_allclose(back[:BLOCK], 1)
    np.testing.assert_allclose(back[2 * BLOCK :], 1)


SMALL, LARGE = 8 << 10, 8 << 20


@pytest.mark.parametrize(
    ("size", "round_trip_s", "bandwidth_bps", "bytes_", "expected"),
    [
        (2, 0.002, 300e6, SMALL, "full"),
        (4, 0.002, 300e6, SMALL, "full"),  # one hop of 1 ms and 0.66 ms of bytes, against 2.4 ms
        (4, 0.0001, 300e6, SMALL, "doubling"),  # the hops cost little, the bytes much
        (8, 0.010, 1e9, SMALL, "full"),
        (8, 0.001, 300e6, LARGE, "doubling"),
        (5, 0.002, 300e6, SMALL, "full"),
        (1, 0.0, 1e9, SMALL, "full"),
    ],
)
def test_the_cheapest_collective_is_chosen(
    size: int, round_trip_s: float, bandwidth_bps: float, bytes_: int, expected: str
) -> None:
    assert choose(size, round_trip_s, bandwidth_bps, bytes_) == expected


def test_the_model_counts_hops_and_the_bytes_of_the_hot_spot() -> None:
    hop_s, part_s = 0.001, SMALL * 8 / 300e6
    expected = {"full": hop_s + 4 * part_s, "doubling": 4 * (hop_s + part_s), "star": 2 * hop_s + 8 * part_s}
    assert seconds(5, 2 * hop_s, 300e6, SMALL) == pytest.approx(expected)
    assert set(seconds(1, 1.0, 1.0, SMALL).values()) == {0.0}


@pytest.mark.parametrize("bad", [(0, 0.1, 1e6, 8), (2, -1.0, 1e6, 8), (2, 0.1, 0.0, 8), (2, float("nan"), 1e6, 8)])
def test_figures_that_are_no_measurement_are_refused(bad: tuple[int, float, float, int]) -> None:
    with pytest.raises(ExperimentError, match="measure it again"):
        choose(*bad)


def test_all_ranks_know_the_same_speed_and_so_choose_alike() -> None:
    speeds = group(4, lambda mesh: (mesh.allreduce(np.ones(2048, np.float32)).sum(), mesh.speed))
    assert len({str(speed) for speed in speeds}) == 1
    total, speed = speeds[0]  # type: ignore[misc]
    assert total == 4 * 2048
    assert 0 < speed.round_trip_s < 1
    assert 1e6 < speed.bandwidth_bps < 1e13
