"""Inner products and weighted sums of long rows: right, precise, and the same bits in any order and by any threads."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.lanes import halves
from fedge.strategies import gram

SIZES = st.sampled_from([1, 7, gram.BLOCK, gram.BLOCK + 1, 3 * gram.BLOCK - 5])


def table(count, size, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((count, size))).astype(np.float32)


@given(st.integers(1, 9), SIZES)
def test_products_are_those_of_float64(count, size):
    rows = table(count, size)
    exact = rows.astype(np.float64) @ rows.astype(np.float64).T
    room = 1e-6 * np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(gram.gram(rows) - exact) <= room).all()
    assert (np.abs(gram.gram(list(rows)) - exact) <= room).all()
    assert (np.abs(gram.gram(rows, rows[0]) - exact) <= room).all()
    assert (np.abs(gram.products(rows, rows[-1]) - exact[-1]) <= room[-1]).all()


@given(st.integers(1, 9), SIZES, st.data())
def test_the_weighted_sum_reads_only_rows_that_count(count, size, data):
    rows = table(count, size)
    used = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    coefficients = np.where(used, np.arange(1.0, count + 1), 0.0)
    wanted = coefficients @ rows.astype(np.float64)
    spoilt = [row if use else np.full_like(row, np.nan) for row, use in zip(rows, used)]
    np.testing.assert_allclose(gram.weighted_sum(spoilt, coefficients), wanted, rtol=1e-5, atol=1e-4)


def test_weights_of_norm_1e3_whose_updates_are_1e_3_keep_their_distances():
    size, base = 200_000, np.random.default_rng(0).standard_normal(200_000)
    base *= 1e3 / np.linalg.norm(base)
    away = np.random.default_rng(1).standard_normal((30, size))
    away *= 1e-3 / np.linalg.norm(away, axis=1, keepdims=True)
    rows = (base + away).astype(np.float32)
    exact = np.array([[np.sum((a.astype(np.float64) - b) ** 2) for b in rows] for a in rows])
    first = gram.gram(rows)
    assert np.abs(gram.distances(first) - exact).max() > exact.max(), "as hard as it is meant to be"
    np.testing.assert_allclose(gram.distances(gram.precise(rows, first)), exact, rtol=1e-3, atol=1e-3 * exact.max())


def test_rows_that_are_far_apart_are_read_once():
    rows = table(5, 100)
    found = gram.gram(rows)
    assert gram.precise(rows, found) is found
    same = np.stack([rows[0], rows[0], rows[1]])
    found = gram.gram(same)
    assert gram.precise(same, found) is found, "equal rows are at distance 0, not at a doubtful one"


def test_rows_may_lie_in_a_read_only_file(tmp_path):
    rows = table(4, 3 * gram.BLOCK)
    (tmp_path / "rows").write_bytes(rows.tobytes())
    mapped = list(np.memmap(tmp_path / "rows", np.float32, "r", shape=rows.shape))
    np.testing.assert_array_equal(gram.gram(mapped), gram.gram(list(rows)))
    np.testing.assert_array_equal(gram.weighted_sum(mapped, np.ones(4)), gram.weighted_sum(rows, np.ones(4)))


def test_halves_cut_at_a_block_and_keep_their_order():
    assert halves(lambda start, stop: (start, stop), 100, 30) == [(0, 60), (60, 100)]
    assert halves(lambda start, stop: (start, stop), 30, 30) == [(0, 30)]
    assert halves(lambda start, stop: (start, stop), 61, 30) == [(0, 60), (60, 61)]


def test_an_error_in_either_half_comes_out():
    for bad in (0, 60):

        def work(start, stop, bad=bad):
            if start == bad:
                raise ValueError(f"in the half from {start}")

        with pytest.raises(ValueError, match=f"from {bad}"):
            halves(work, 100, 30)


PROGRAM = """
import hashlib, numpy as np
from fedge.strategies.aggregators import build
rows = np.random.default_rng(0).standard_normal((12, 70_001), dtype=np.float32)
digest = hashlib.sha256()
for settings in (
    {"kind": "multi-krum", "byzantine": 2, "pre": ["nnm"]},
    {"kind": "trimmed-mean", "byzantine": 2, "pre": ["nnm"]},
):
    rule = build(settings)
    state = rule.init(rows.shape[1])
    for row in rows:
        state = rule.fold(state, row, 1.0)
    digest.update(rule.finish(state, [f"c{i:02d}" for i in range(12)], rule.memory(), 0).vector.tobytes())
print(digest.hexdigest())
"""


def test_the_number_of_threads_changes_no_bit():
    digests = set()
    for threads in ("1", "2", "5"):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(ran.stdout.strip())
    assert len(digests) == 1
