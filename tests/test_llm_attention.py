"""Attention in chunks, over views of a cache, against one query after another."""

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedge.edge.llm.ranks import attention


def _attention(queries: Any, keys: Any, values: Any, start: int, window: int) -> Any:
    """One query after another."""
    kv, count, group_, head_dim = queries.shape
    out = np.zeros((count, kv, group_, head_dim), np.float64)
    for at in np.ndindex(kv, count, group_):
        stop = start + at[1] + 1
        seen = slice(max(0, stop - window) if window else 0, stop)
        weights = keys[at[0], seen].astype(np.float64) @ queries[at]
        weights = np.exp(weights - weights.max())
        out[at[1], at[0], at[2]] = weights / weights.sum() @ values[at[0], seen]
    return out


@settings(deadline=None, max_examples=60)
@given(
    kv=st.integers(1, 3),
    count=st.integers(1, 12),
    group_=st.integers(1, 3),
    start=st.integers(0, 15),
    window=st.integers(0, 20),
    most=st.sampled_from([1, 30, 100, 1 << 20]),
    loud=st.sampled_from([1.0, 300.0]),
)
@example(kv=2, count=9, group_=2, start=6, window=4, most=60, loud=1.0)
def test_attention_is_that_of_one_query_after_another(
    kv: int, count: int, group_: int, start: int, window: int, most: int, loud: float
) -> None:
    random = np.random.default_rng(1)
    queries = random.standard_normal((kv, count, group_, 8), np.float32) * np.float32(loud)
    keys, values = random.standard_normal((2, kv, 32, 8), np.float32)
    values[:, start + count :] = np.nan  # what lies behind is never looked at
    out = np.empty((count, kv, group_, 8), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MAX_SCORES", most)
        work = attention.Attention(window)
        work.attend(queries, keys, values, start, out)
    wanted = _attention(queries, keys, values, start, window)
    np.testing.assert_allclose(out, wanted, rtol=1e-3, atol=1e-4 * (1 if loud == 1 else 20))
    assert work._scores.size <= max(1 << 14, most, kv * group_ * (start + count))
