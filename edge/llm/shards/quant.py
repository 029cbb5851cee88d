"""Weights as float32, int8 or int4: how a matrix is rounded, and how it lies in memory.

int8 is symmetric with one scale per output channel. int4 has one scale per block of 32 columns, in the layout of
onnxruntime's operator MatMulNBits. Owns rounding. Must never multiply: that is the kernels' work.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array

Kind = Literal["float32", "int8", "int4"]
KINDS: tuple[Kind, ...] = ("float32", "int8", "int4")
# What a model's vocabulary matrix is rounded to: in 4 bits it alone would cost about as much exactness as all layers.
HEADS: Mapping[Kind, Kind] = {"float32": "float32", "int8": "int8", "int4": "int8"}
BLOCK = 32  # columns that share a scale in int4
PER_WEIGHT: Mapping[Kind, float] = {"float32": 4, "int8": 1, "int4": 1 / 2 + 4 / BLOCK}  # bytes, about
ZERO = 8  # what stands for 0.0 in int4
_SLAB = 1 << 16  # weights rounded at a time, so that they stay in the processor's cache
_TINY = float(np.finfo(np.float32).tiny)


def _nothing() -> Array:
    return np.empty(0, np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """The W and b of y = x W^T + b, with W [rows, columns] and b float32 [rows], or None for no bias.

    | kind    | data                                          | scale                    |
    |---------|-----------------------------------------------|--------------------------|
    | float32 | float32 [rows, columns]                       | empty                    |
    | int8    | int8 [rows, columns]                          | float32 [rows]           |
    | int4    | uint8 [rows, blocks, 16], low nibble first    | float32 [rows, blocks]   |

    A weight is `data * scale`, in int4 `(data - 8) * scale`. A last block of int4 that is not full ends in zeros.
    Either size may be 0.
    """

    kind: Kind
    rows: int
    columns: int
    data: Array
    scale: Array = field(default_factory=_nothing)
    bias: Array | None = None


def blocks(columns: int) -> int:
    """Blocks of int4 in a row."""
    return -(-columns // BLOCK)


def quantise(weight: Array, kind: Kind, bias: Array | None = None) -> Matrix:
    """Round float32 `weight` [rows, columns]. Rows are independent, so slabs of rows may be rounded one by one.

    Raises ModelError for weights or a bias that are not finite.
    """
    rows, columns = weight.shape
    if bias is not None:
        require_finite(bias)
    if kind == "float32":
        require_finite(weight)
        return Matrix(kind, rows, columns, np.ascontiguousarray(weight, np.float32), bias=bias)
    if kind == "int8":
        data, scale = np.empty((rows, columns), np.int8), np.zeros(rows, np.float32)
    else:
        data = np.empty((rows, blocks(columns), BLOCK // 2), np.uint8)
        scale = np.zeros((rows, blocks(columns)), np.float32)
    if weight.size:
        step = max(1, _SLAB // columns)
        work = _round_int8 if kind == "int8" else _round_int4
        for start in range(0, rows, step):
            part = slice(start, start + step)
            work(np.asarray(weight[part], np.float32), data[part], scale[part])
    return Matrix(kind, rows, columns, data, scale, bias)


def require_finite(numbers: Array) -> Array:
    """The numbers themselves. Raises ModelError where one of them is NaN or infinite."""
    if not np.isfinite(numbers).all():
        raise ModelError("The model has weights that are not finite; download or export it again.")
    return numbers


def _round_int8(weight: Array, data: Array, scale: Array) -> None:
    scale[:] = np.maximum(weight.max(1), -weight.min(1)) / 127
    np.multiply(weight, _inverse(scale)[:, None], out=(scaled := np.empty_like(weight)))
    np.rint(scaled, out=scaled)
    data[:] = scaled


def _round_int4(weight: Array, data: Array, scale: Array) -> None:
    """The value of largest magnitude becomes -8, the one level without a counterpart of the other sign."""
    rows, columns = weight.shape
    if columns % BLOCK:
        weight = np.pad(weight, ((0, 0), (0, -columns % BLOCK)))
    values = weight.reshape(rows, -1, BLOCK)
    high, low = values.max(2), values.min(2)
    scale[:] = np.where(high > -low, high, low) / -ZERO
    scaled = values * _inverse(scale)[:, :, None]
    scaled += ZERO + 0.5
    np.minimum(scaled, 15, out=scaled)
    levels = scaled.astype(np.uint8)
    np.bitwise_or(levels[:, :, ::2], levels[:, :, 1::2] << 4, out=data)


def _inverse(scale: Array) -> Array:
    """1 / scale, and 0 for a scale so small that its inverse would overflow; that scale becomes 0 as well."""
    require_finite(scale)  # a row's, or a block's, is what its weights are
    scale[np.abs(scale) < _TINY] = 0
    with np.errstate(divide="ignore"):
        inverse: Array = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    return inverse
