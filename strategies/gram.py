"""Inner products of long rows, and their weighted sum: all that rules of the Gram family ever ask of the rows.

Rows stay where they are, in memory or mapped from files, and are read once per product. Products are formed in float32
over short blocks and added up in float64, so the error of an entry is some 1e-8 of |x||y|; where rows are so close
that their distance would drown in it, the products are formed again around one of them.

Every sum has one order whatever the number of threads, so the results are the same to the bit. Must never hold a rule.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedge.core.lanes import halves
from fedge.core.params import Vector

Matrix = NDArray[np.float64]
Weights = NDArray[np.float64]

BLOCK = 1 << 13  # elements per product: OpenBLAS adds up longer ones in several threads
SUM_BLOCK = 1 << 18  # elements per step of a weighted sum: shorter ones make lanes wait for the interpreter
CLOSE = 1e-6  # of the squared norms: a smaller squared distance needs products around a common row


def products(rows: Sequence[Vector], new: Vector) -> Weights:
    """<row, new> for every row [d], float64 [n]; one pass over the rows."""

    def part(start: int, stop: int) -> Weights:
        total = np.zeros(len(rows))
        with np.errstate(over="ignore", invalid="ignore"):  # known to each thread by itself
            for low in range(start, stop, BLOCK):
                here = slice(low, min(low + BLOCK, stop))
                one = new[here]
                total += [np.dot(row[here], one) for row in rows]
        return total

    with np.errstate(invalid="ignore"):  # an overflow is for the caller to see in the result
        total: Weights = np.sum(halves(part, new.size, BLOCK), axis=0)
    return total


def away(rows: Sequence[Vector], centre: Vector) -> Weights:
    """|row - centre| for every row [d], float64 [n]; one pass over the rows."""

    def part(start: int, stop: int) -> Weights:
        total, scratch = np.zeros(len(rows)), np.empty(SUM_BLOCK, np.float32)
        for low in range(start, stop, SUM_BLOCK):
            here = slice(low, min(low + SUM_BLOCK, stop))
            one, apart = centre[here], scratch[: here.stop - low]
            for index, row in enumerate(rows):
                np.subtract(row[here], one, out=apart)
                total[index] += np.dot(apart, apart)
        return total

    found: Weights = np.sqrt(np.sum(halves(part, centre.size, SUM_BLOCK), axis=0))
    return found


def gram(rows: Sequence[Vector] | NDArray[np.float32], around: Vector | None = None) -> Matrix:
    """All inner products of the rows [n, d], float64 [n, n], in one pass.

    `around` [d] is subtracted before the products are formed and accounted for after: distances between rows that are
    close to it keep their precision.
    """
    count, size = len(rows), rows[0].size
    whole = isinstance(rows, np.ndarray) and around is None

    def part(start: int, stop: int) -> tuple[Matrix, Weights, float]:
        total, along, square = np.zeros((count, count)), np.zeros(count), 0.0
        scratch = np.empty((count, BLOCK), np.float32)
        for low in range(start, stop, BLOCK):
            here = slice(low, min(low + BLOCK, stop))
            panel = rows[:, here] if whole else scratch[:, : here.stop - low]  # type: ignore[call-overload]
            if not whole:
                for place, row in zip(panel, rows):
                    place[:] = row[here] if around is None else row[here] - around[here]
            with np.errstate(over="ignore", invalid="ignore"):  # as in `products`
                total += panel @ panel.T
            if around is not None:
                centre = around[here].astype(np.float64)
                along += panel @ centre
                square += float(centre @ centre)
        return total, along, square

    totals, alongs, squares = zip(*halves(part, size, BLOCK))
    with np.errstate(invalid="ignore"):
        along: Weights = sum(alongs)
        found: Matrix = sum(totals) + along[:, None] + along[None, :] + sum(squares)
    return found


def precise(rows: Sequence[Vector] | NDArray[np.float32], found: Matrix) -> Matrix:
    """`found`, or the products formed anew where some distance would be noise."""
    norms = np.diag(found)
    apart = distances(found)
    close = (apart < CLOSE * (norms[:, None] + norms[None, :])) & (apart > 0)
    np.fill_diagonal(close, val=False)
    return gram(rows, rows[int(close.any(axis=1).argmax())]) if close.any() else found


def distances(found: Matrix) -> Matrix:
    """Squared distances between rows with these inner products, [..., n, n]; never below 0."""
    norms = np.diagonal(found, axis1=-2, axis2=-1)
    squares: Matrix = np.maximum(norms[..., :, None] + norms[..., None, :] - 2.0 * found, 0.0)
    own = range(found.shape[-1])
    squares[..., own, own] = 0.0
    return squares


def weighted_sum(rows: Sequence[Vector], coefficients: Weights) -> Vector:
    """Sum of coefficient * row, float32 [d]; rows with the coefficient 0 are not even read."""
    used = np.flatnonzero(coefficients).tolist()
    total = np.zeros(rows[0].size, np.float32)

    def part(start: int, stop: int) -> None:
        scratch = np.empty(SUM_BLOCK, np.float32)
        for low in range(start, stop, SUM_BLOCK):
            here = slice(low, min(low + SUM_BLOCK, stop))
            sums, product = total[here], scratch[: here.stop - low]
            for index in used:
                np.multiply(rows[index][here], np.float32(coefficients[index]), out=product)
                sums += product

    halves(part, total.size, SUM_BLOCK)
    return total
