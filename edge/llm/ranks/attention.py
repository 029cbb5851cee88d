"""Attention of one part of a step over its slot: grouped queries, causal, with a sliding window if the model has one.

Owns the softmax and its memory. Keys and values are views of the cache and never copied; queries go through in chunks,
so that the scores of a long prompt stay below a bound. Must never know of ranks, slots or weights.
"""

import math

import numpy as np

from fedge.core.params import Array

MAX_SCORES = 1 << 18  # floats of one chunk of queries: 1 MiB stays in a second-level cache, which halves the time


class Attention:
    """The work memory of one rank, and the two facts that every part shares. `window` 0 looks back to the beginning."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._scores = np.empty(1 << 14, np.float32)

    def attend(self, queries: Array, keys: Array, values: Array, start: int, out: Array) -> None:
        """Write softmax(q k^T) v for `n` tokens at positions `start`, `start` + 1, ... of a slot.

        queries [kv, n, group, head_dim], scaled by 1 / sqrt(head_dim) already; keys and values [kv, >= start + n,
        head_dim], those of the part included; out [n, kv, group, head_dim]. Scaled dot-product attention (arXiv
        1706.03762, section 3.2.1) with grouped queries (arXiv 2305.13245).
        """
        count = queries.shape[1]
        if count == 1:
            self._chunk(queries, keys, values, start, out)
            return
        heads = queries.shape[0] * queries.shape[2]
        size = max(1, MAX_SCORES // (heads * (start + count)))
        for first in range(0, count, size):
            last = min(count, first + size)
            self._chunk(queries[:, first:last], keys, values, start + first, out[first:last])

    def _chunk(self, queries: Array, keys: Array, values: Array, start: int, out: Array) -> None:
        kv, count, group, head_dim = queries.shape
        stop = start + count
        first = max(0, start + 1 - self._window) if self._window else 0
        scores = self._room(kv, count * group, stop - first)
        np.matmul(queries.reshape(kv, count * group, head_dim), keys[:, first:stop].transpose(0, 2, 1), out=scores)
        if count > 1:
            self._hide(scores.reshape(kv, count, group, stop - first), start, first)
        np.subtract(scores, np.maximum.reduce(scores, axis=2, keepdims=True), out=scores)
        np.exp(scores, out=scores)
        total = np.add.reduce(scores, axis=2, keepdims=True)
        mixed = np.matmul(scores, values[:, first:stop])
        np.divide(mixed, total, out=mixed)
        out[:] = mixed.reshape(kv, count, group, head_dim).transpose(1, 0, 2, 3)

    def _hide(self, scores: Array, start: int, first: int) -> None:
        """Minus infinity where a query may not look: at later positions, and at those before its window."""
        _, count, _, width = scores.shape
        here = np.arange(start, start + count)[:, None, None]
        if not self._window:
            first, scores = start, scores[..., width - count :]  # all older positions are seen by all
        there = np.arange(first, start + count)
        hidden = there > here
        if self._window:
            hidden |= there <= here - self._window
        np.copyto(scores, -math.inf, where=hidden)

    def _room(self, kv: int, rows: int, width: int) -> Array:
        size = kv * rows * width
        if size > self._scores.size:
            self._scores = np.empty(size, np.float32)
        return self._scores[:size].reshape(kv, rows, width)
