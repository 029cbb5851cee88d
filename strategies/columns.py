"""All rows' values of each coordinate, a block of coordinates at a time: what coordinate-wise rules work on.

A block is copied and transposed so that the values of one coordinate lie side by side, where NumPy sorts them with
vector instructions; so beside the rows, which may be mapped from files, there are never more than a few blocks of
copies. Also here: what several such rules take from sorted values. Must never know a rule.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedge.core.lanes import halves
from fedge.core.params import Vector
from fedge.strategies.gram import Matrix

Columns = NDArray[np.float32]

BLOCK = 1 << 13  # coordinates: some rows of them fit in a cache, and lanes seldom wait for the interpreter
APART = 16  # elements more between rows of a block: at a power of two they would crowd the same few lines of the cache


def columnwise(rows: Sequence[Vector], reduce: Callable[[Columns], Vector], mixing: Matrix | None = None) -> Vector:
    """float32 [d]: `reduce` of the values [c, n] of each block of coordinates, or of those of `mixing @ rows`."""
    if mixing is not None and _picks(mixing):
        rows, mixing = [rows[index] for index in mixing.argmax(axis=1).tolist()], None
    matrix = (np.eye(len(rows)) if mixing is None else mixing).astype(np.float32)
    result = np.empty(rows[0].size, np.float32)

    def part(start: int, stop: int) -> None:
        panel, mixed = (np.empty((count, BLOCK + APART), np.float32) for count in matrix.shape[::-1])
        columns = np.empty((BLOCK, len(matrix)), np.float32)
        for low in range(start, stop, BLOCK):
            high = min(low + BLOCK, stop)
            source = panel[:, : high - low]
            for place, row in zip(source, rows):
                place[:] = row[low:high]
            if mixing is not None:
                source = np.matmul(matrix, source, out=mixed[:, : high - low])
            np.copyto(columns[: high - low], source.T)
            result[low:high] = reduce(columns[: high - low])

    halves(part, rows[0].size, BLOCK)
    return result


def _picks(mixing: Matrix) -> bool:
    """Whether every row of the matrix is one of the rows behind it, unchanged."""
    return np.count_nonzero(mixing) == len(mixing) and bool((mixing.max(axis=1) == 1.0).all())


# ---- of values in ascending order, [c, n] ------------------------------------------------------


def middle(ordered: Columns) -> Vector:
    """The median, [c]; between the two middle values where n is even."""
    count = ordered.shape[1]
    low, high = ordered[:, (count - 1) // 2], ordered[:, count // 2]
    return low.copy() if count % 2 else 0.5 * low + 0.5 * high


def trimmed(ordered: Columns, cut: int) -> Vector:
    """The mean without the `cut` smallest and largest, [c]."""
    kept = ordered[:, cut : ordered.shape[1] - cut]
    mean: Vector = np.einsum("ij->i", kept) / np.float32(kept.shape[1])  # several times as fast as kept.mean(axis=1)
    return mean


def nearest_mean(ordered: Columns, centre: Vector, keep: int) -> Vector:
    """The mean of the `keep` values nearest to the centre [c], [c]; the lower one counts where two are as near.

    In sorted values they lie side by side. Of any two that are `keep` places apart exactly one is among them, the
    nearer; and those that have no such partner always are.
    """
    pairs = min(keep, ordered.shape[1] - keep)
    edges = np.empty((pairs + ordered.shape[1] - keep, len(ordered)), np.float32)
    np.concatenate([ordered[:, :pairs].T, ordered[:, keep:].T], out=edges)
    chosen, twice = edges[:pairs], 2 * centre
    for first in range(pairs, len(edges), max(1, pairs)):
        higher = edges[first : first + pairs]
        lower = edges[first - pairs : first - pairs + len(higher)]
        np.copyto(chosen[: len(higher)], higher, where=lower + higher < twice)
    total: Vector = np.einsum("ij->i", ordered[:, pairs:keep]) + chosen.sum(axis=0)
    return total / np.float32(keep)
