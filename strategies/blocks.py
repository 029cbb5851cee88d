"""Vectors in blocks that stay in the processor's cache, so that a formula of many operations reads memory once.

Owns the block length and the two loops over it. Must never know what the numbers mean.
"""

from collections.abc import Iterator

import numpy as np

from fedge.core.params import Vector

BLOCK = 1 << 17  # elements: 512 KiB of float32; shorter blocks cost more in calls than they save in cache


def blocks(*vectors: Vector) -> Iterator[tuple[Vector, ...]]:
    """Views of the same block of every vector [d], one block after the other."""
    for start in range(0, vectors[0].size, BLOCK):
        yield tuple(vector[start : start + BLOCK] for vector in vectors)


def accumulate(total: Vector, row: Vector, weight: float) -> None:
    """Add weight * row to `total` in place, with no temporary longer than a block."""
    if weight == 1.0:
        np.add(total, row, out=total)
        return
    scratch = np.empty(min(BLOCK, total.size), np.float32)
    for here, there in blocks(total, row):
        product = scratch[: here.size]
        np.multiply(there, weight, out=product)
        np.add(here, product, out=here)
