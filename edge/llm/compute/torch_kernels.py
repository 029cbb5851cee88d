"""Products with torch, for machines that have it; nothing else on a device needs it.

Owns the conversions between NumPy and torch. Must never import torch before a kernel is used.
"""

import importlib.util
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.compute.numpy_kernels import single_rows
from fedge.edge.llm.shards.quant import Matrix

_here = threading.local()
_TINY = np.float32(1e-30)  # instead of a scale of 0, so that zeros stay zeros


def available() -> bool:
    """Whether torch is installed."""
    return importlib.util.find_spec("torch") is not None


def _torch() -> Any:
    """The module, with one thread: ranks on one machine that want more threads than cores come to a crawl.

    torch keeps that number for every thread that calls it, so each asks for the module when it multiplies.
    """
    if not hasattr(_here, "torch"):
        import torch

        torch.set_num_threads(1)
        _here.torch = torch
    return _here.torch


def float32(matrix: Matrix) -> Callable[[Array], Array]:
    """float32 where it lies."""
    weight = _shared(matrix.data)

    def linear(x: Array) -> Array:
        torch = _torch()
        with torch.inference_mode():
            y: Array = torch.nn.functional.linear(_shared(x), weight).numpy()
        return y

    return linear


def int8(matrix: Matrix) -> Callable[[Array], Array]:
    """int8 where it lies; every row of x is rounded to int8 with a scale of its own, and sums are exact.

    torch's packed product is faster and has one scale for all rows, with which a text's first token spoils the others.
    """
    if matrix.columns == 1:  # torch 2.13 reads beyond such a matrix
        return single_rows(matrix)
    weight, scale = _shared(matrix.data).t(), matrix.scale

    def linear(x: Array) -> Array:
        torch = _torch()
        size = np.maximum(np.abs(x).max(axis=1, keepdims=True) / np.float32(127), _TINY)
        levels = np.rint(x / size).astype(np.int8)
        with torch.inference_mode():
            y: Array = torch._int_mm(torch.from_numpy(levels), weight).numpy().astype(np.float32)
        y *= scale
        y *= size
        return y

    return linear


def _shared(array: Array) -> Any:
    """A tensor on the same memory, which is only read."""
    if array.flags.writeable:
        return _torch().from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it could be written to
        return _torch().from_numpy(array)
