"""Products with onnxruntime: one small session per matrix, which holds the weights in an order of its own.

The fastest kernels without torch. What a session holds is private memory; the weights it was made from are not needed
afterwards. Owns how such sessions are made. Must never import onnx, nor change or keep the matrix's own bytes.
"""

import importlib.util
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.llm.compute import graph
from fedge.edge.llm.shards.quant import BLOCK, Matrix

_WIDTHS = (32, 64, 128)  # of int8: columns of x that share a scale; 256 would take less memory, but more time
_FINE = 64  # up to which rows are computed as if each were alone
_PER_BLOCK_BYTES = 12  # what a block of int8 costs beside its weights
_INT8 = 4  # the accuracy level at which x is rounded to int8, a scale for every block of columns
_ZERO = 0x80  # what stands for 0 in 8 bits


def available() -> bool:
    """Whether onnxruntime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def float32(matrix: Matrix) -> Callable[[Array], Array]:
    """float32; private memory as large as the weights."""
    operator = graph.Operator("Gemm", attributes={"transB": 1})
    return _session(operator, {"w": matrix.data}, matrix, matrix.columns)


def int4(matrix: Matrix) -> Callable[[Array], Array]:
    """int4, x rounded to int8 for every 32 columns."""
    return _blocked({"w": matrix.data, "s": matrix.scale}, matrix, 4, BLOCK)


def int8(matrix: Matrix) -> Callable[[Array], Array]:
    """int8, x rounded to int8 for every 128 columns, or fewer where that takes less memory."""
    return _int8(matrix, min(reversed(_WIDTHS), key=lambda one: -(-matrix.columns // one) * (one + _PER_BLOCK_BYTES)))


def fine_int8(matrix: Matrix) -> Callable[[Array], Array]:
    """int8, x rounded to int8 for every 64 columns: a tenth more memory, and slower, but each row as if alone."""
    return _int8(matrix, _FINE)


def _int8(matrix: Matrix, width: int) -> Callable[[Array], Array]:
    blocks = -(-matrix.columns // width)
    # The operator wants bytes around 128. They are made in memory that can be given back at once (if it is private).
    spare = mmap.mmap(-1, matrix.rows * blocks * width, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    weights = np.frombuffer(spare, np.uint8).reshape(matrix.rows, blocks * width)
    _shift(matrix, weights)
    scale = np.repeat(matrix.scale[:, None], blocks, axis=1)
    given = {"w": weights.reshape(matrix.rows, blocks, width), "s": scale}
    linear = _blocked(given, matrix, 8, width)
    x = np.linspace(-1, 1, 9 * matrix.columns, dtype=np.float32).reshape(9, -1)
    before = linear(x[:1]), linear(x)
    spare.madvise(mmap.MADV_DONTNEED)  # zeros from here on
    after = linear(x[:1]), linear(x)
    if not all(np.array_equal(one, other) for one, other in zip(before, after)):
        _shift(matrix, weights)  # this onnxruntime computes on what it was given
    return linear


def _shift(matrix: Matrix, weights: Array) -> None:
    np.bitwise_xor(matrix.data.view(np.uint8), _ZERO, out=weights[:, : matrix.columns])
    weights[:, matrix.columns :] = _ZERO


def _blocked(weights: Mapping[str, Array], matrix: Matrix, bits: int, width: int) -> Callable[[Array], Array]:
    """The operator on whole blocks, with zeros after the columns of x where the last is not full."""
    columns = weights["w"].shape[1] * width
    sizes = {"K": columns, "N": matrix.rows, "bits": bits, "block_size": width, "accuracy_level": _INT8}
    whole = _session(graph.Operator("MatMulNBits", "com.microsoft", sizes), weights, matrix, columns)
    if columns == matrix.columns:
        return whole
    return lambda x: whole(np.pad(x, ((0, 0), (0, columns - matrix.columns))))


def _session(
    operator: graph.Operator, weights: Mapping[str, Array], matrix: Matrix, columns: int
) -> Callable[[Array], Array]:
    import onnxruntime

    from fedge.edge.runtime.sessions import options

    chosen = options(threads=1, packed=True)
    # Results come in memory of NumPy's own; nothing else is to be kept between calls.
    chosen.enable_cpu_mem_arena = False
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
    chosen.add_external_initializers(list(values), list(values.values()))
    model = graph.linear(operator, weights, columns, matrix.rows)
    try:
        session = onnxruntime.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes have no common one
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"onnxruntime cannot multiply {matrix.kind} ({reason}); choose another kernel.") from None
    return _runner(session, values)


def _runner(session: Any, values: object) -> Callable[[Array], Array]:
    """`values` must live as long as the session, which may refer to them."""

    def linear(x: Array, _alive: object = values) -> Array:
        y: Array = session.run(["y"], {"x": x})[0]
        return y

    return linear
