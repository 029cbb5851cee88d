"""Products with NumPy alone, on the bytes of a shard as they lie: they work everywhere.

float32 is as fast as memory. int8 and int4 become float32 a slab at a time, small enough to stay in the processor's
cache, which is several times slower than the other kernels. Owns nothing else. Must never keep a copy of a matrix.
"""

from collections.abc import Callable

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.shards.quant import BLOCK, ZERO, Matrix

_SLAB_BYTES = 512 << 10  # of float32


def available() -> bool:
    """Always."""
    return True


def whole(matrix: Matrix) -> Callable[[Array], Array]:
    """float32 in one product."""
    transposed = matrix.data.T

    def linear(x: Array) -> Array:
        y: Array = x @ transposed
        return y

    return linear


def slabs(matrix: Matrix) -> Callable[[Array], Array]:
    """A slab of weights after the other, with all rows of x."""
    return _by_slabs(matrix, _together)


def single_rows(matrix: Matrix) -> Callable[[Array], Array]:
    """A slab of weights after the other, with one row of x after the other: each as if it were alone."""
    return _by_slabs(matrix, _apart)


def _by_slabs(matrix: Matrix, multiply: Callable[[Array, Array, Array], None]) -> Callable[[Array], Array]:
    step = max(1, _SLAB_BYTES // 4 // matrix.columns)

    def linear(x: Array) -> Array:
        y = np.empty((len(x), matrix.rows), np.float32)
        if matrix.kind == "int4":
            x = _split(x)
        for start in range(0, matrix.rows, step):
            part = slice(start, start + step)
            multiply(x, _weights(matrix, part), y[:, part])
        if matrix.kind == "int8":
            y *= matrix.scale
        return y

    return linear


def _weights(matrix: Matrix, part: slice) -> Array:
    """Some rows as float32; of int8 without their scales, of int4 with the columns as `_split` orders them."""
    data = matrix.data[part]
    if matrix.kind == "float32":
        return data
    if matrix.kind == "int8":
        return data.astype(np.float32)
    levels = np.empty((*data.shape[:2], 2, BLOCK // 2), np.int8)
    np.bitwise_and(data, 15, out=levels.view(np.uint8)[:, :, 0])
    np.right_shift(data, 4, out=levels.view(np.uint8)[:, :, 1])
    levels -= ZERO
    values: Array = levels.reshape(*data.shape[:2], BLOCK) * matrix.scale[part][:, :, None]
    return values.reshape(len(data), -1)


def _split(x: Array) -> Array:
    """Columns in whole blocks of int4, the even ones of a block before the odd ones, as low and high nibbles lie."""
    whole = np.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
    return whole.reshape(len(x), -1, BLOCK // 2, 2).swapaxes(2, 3).reshape(len(x), -1)


def _together(x: Array, weights: Array, y: Array) -> None:
    np.matmul(x, weights.T, out=y)


def _apart(x: Array, weights: Array, y: Array) -> None:
    for row in range(len(x)):
        np.dot(weights, x[row], out=y[row])
