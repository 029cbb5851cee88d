"""All rows' values of each coordinate, a block of coordinates at a time: what coordinate-wise rules work on.

A block is copied and transposed so that the values of one coordinate lie side by side, where NumPy sorts them with
vector instructions; so beside the rows, which may be mapped from files, there is never more than two blocks of copies.
Must never know a rule.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedge.core.lanes import halves
from fedge.core.params import Vector
from fedge.strategies.gram import Matrix

BLOCK = 1 << 13  # coordinates


def columnwise(
    rows: Sequence[Vector], reduce: Callable[[NDArray[np.float32]], Vector], mixing: Matrix | None = None
) -> Vector:
    """float32 [d]: `reduce` of the values [c, n] of each block of coordinates, or of those of `mixing @ rows`."""
    size, matrix = rows[0].size, None if mixing is None else mixing.astype(np.float32)
    result = np.empty(size, np.float32)

    def part(start: int, stop: int) -> None:
        scratch = np.empty(len(rows) * BLOCK, np.float32)
        for low in range(start, stop, BLOCK):
            high = min(low + BLOCK, stop)
            flat = scratch[: len(rows) * (high - low)]
            np.concatenate([row[low:high] for row in rows], out=flat)
            panel = flat.reshape(len(rows), -1)
            result[low:high] = reduce(np.ascontiguousarray((panel if matrix is None else matrix @ panel).T))

    halves(part, size, BLOCK)
    return result
