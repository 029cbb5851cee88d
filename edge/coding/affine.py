"""Floats as bytes: x is about low + q (high - low) / 255 with q rounded to the nearest of 0..255.

One range for the tensor, or one per channel (axis 1); a percentile clips outliers, which else take the whole range for
themselves. Affine quantisation as by Jacob et al. (CVPR 2018). Must never see the wire.
"""

from math import prod

import numpy as np

from fedge.core.errors import RefusedTensor
from fedge.core.params import Array, Vector

LEVELS = 255
SAMPLE = 1 << 14  # values per range from which a percentile is taken: all of them would cost more than the coding
BLOCK = 1 << 16  # elements that are worked on at a time, so that the passes run in the cache
LEAST = np.float32(1e-30)  # a narrower range counts as one value: 255 / range would overflow


def channels(shape: tuple[int, ...]) -> int:
    """How many ranges a tensor has that is coded per channel."""
    return shape[1] if len(shape) > 1 else 1


def ranges(array: Array, count: int, percentile: float) -> tuple[Vector, Vector]:
    """Lowest and highest value per range, float32 [count] each; [0] for a tensor without values.

    `percentile` below 100 clips: it is taken, and its mirror image, over at most 2^14 or so values per range.
    Raises RefusedTensor on NaN and infinities, and on ranges wider than float32.
    """
    x = planes(array, count)
    if not x.size:
        return np.zeros(count, np.float32), np.zeros(count, np.float32)
    low, high = x.min(axis=(0, 2)), x.max(axis=(0, 2))
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(high - low).all():
            raise RefusedTensor("A tensor with NaN, infinite or huge values has no 8-bit coding; send it `raw`.")
    if percentile < 100.0:
        step = (x.size // count // SAMPLE) | 1
        few = np.moveaxis(x, 1, 0).reshape(count, -1)[:, ::step]
        low, high = np.percentile(few, [100.0 - percentile, percentile], axis=1).astype(np.float32)
    return low, high


def quantise(array: Array, low: Vector, high: Vector, *, clip: bool) -> Array:
    """The bytes of a float tensor, uint8 of its shape. `clip` where values may lie outside the range."""
    x = planes(array, low.size)
    out = np.empty(x.shape, np.uint8)
    span = high - low
    scale = np.where(span > LEAST, np.float32(LEVELS) / np.maximum(span, LEAST), np.float32(0))
    low, high, scale = low[:, None], high[:, None], scale[:, None]
    for part in _blocks(x.shape):
        y = np.clip(x[part], low, high) if clip else x[part]
        y = np.subtract(y, low, dtype=np.float32)
        y *= scale
        np.rint(y, out=y)
        np.copyto(out[part], y, casting="unsafe")
    return out.reshape(array.shape)


def restore(codes: Array, low: Vector, high: Vector) -> Vector:
    """The floats that the bytes stand for, float32 of the same shape."""
    q = planes(codes, low.size)
    out = np.empty(q.shape, np.float32)
    step = (high - low)[:, None] / np.float32(LEVELS)
    low = low[:, None]
    for part in _blocks(q.shape):
        y = out[part]
        np.multiply(q[part], step, out=y)
        y += low
    return out.reshape(codes.shape)


def planes(array: Array, count: int) -> Array:
    """The tensor as [before, ranges, after], a view where it lies in one piece."""
    shape = array.shape
    if count == 1 and channels(shape) != 1:
        return array.reshape(1, 1, -1)
    return array.reshape(prod(shape[:1]) if len(shape) > 1 else 1, count, prod(shape[2:] if len(shape) > 1 else shape))


def _blocks(shape: tuple[int, ...]) -> list[tuple[slice, slice, slice]]:
    """Slices over [before, ranges, after] of some BLOCK elements each. Ranges stay whole."""
    before, ranges_, after = shape
    long = max(1, BLOCK // max(1, ranges_))
    if after >= long:
        cuts = [slice(low, low + long) for low in range(0, after, long)]
        return [(slice(i, i + 1), slice(None), cut) for i in range(before) for cut in cuts]
    rows = max(1, long // max(1, after))
    return [(slice(low, low + rows), slice(None), slice(None)) for low in range(0, before, rows)]
