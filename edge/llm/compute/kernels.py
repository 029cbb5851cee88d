"""y = x W^T + b on this machine: which ways of computing it there are, and which is the fastest here.

A kernel either copies a matrix into an order of its own (fast, but the copy stays in memory) or computes on the bytes
as they lie in a shard, in which case it `streams`: its linear maps stay right when other weights are read into the same
buffer. It is `invariant` where a row of y does not depend on the other rows of x, to the bit, so that a sequence's
tokens do not depend on the company it is computed in. Owns the table and the measurement. Must never read a file.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError, ModelError
from fedge.core.lanes import plain_products
from fedge.core.params import Array
from fedge.edge.llm.compute import numpy_kernels, onnx_kernels, torch_kernels
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.shards.quant import HEADS, Kind, Matrix, blocks

Linear = Callable[[Array], Array]
PROMPT = 64  # rows that stand for a prompt
_APART_BYTES = 48 << 20  # matrices that together take so much do not stay in a processor's cache
_PART_OF_ROOM = 32  # nor do they take more than such a part of the memory there is; a small device has a small cache
_MOST = 24  # matrices at a time
_ROUNDS = 2  # at least; in the first everything is cold
_HOPELESS = 3.0  # times as long as the fastest: not measured any further
_ALIKE = 1.1  # within noise


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to multiply matrices of one kind. `make` is given matrices without empty sides, and ignores the bias."""

    name: str
    kind: Kind
    streams: bool
    invariant: bool
    make: Callable[[Matrix], Linear]
    available: Callable[[], bool]

    def prepare(self, matrix: Matrix) -> Linear:
        """The map from x [m, columns] float32, m > 0, C-contiguous, to a new y [m, rows] float32.

        Raises ModelError for a matrix of another kind, and where it cannot be multiplied here.
        """
        if matrix.kind != self.kind:
            raise ModelError(f"The kernel {self.name!r} cannot multiply {matrix.kind}; choose one for {matrix.kind}.")
        multiply = self.make(matrix) if matrix.rows and matrix.columns else _zeros(matrix.rows)
        return multiply if matrix.bias is None else _biased(multiply, matrix.bias)


_ALL = (
    Kernel("numpy-float32", "float32", True, False, numpy_kernels.whole, numpy_kernels.available),
    Kernel("numpy-int8", "int8", True, False, numpy_kernels.slabs, numpy_kernels.available),
    Kernel("numpy-int4", "int4", True, False, numpy_kernels.slabs, numpy_kernels.available),
    Kernel("numpy-rows-float32", "float32", True, True, numpy_kernels.single_rows, numpy_kernels.available),
    Kernel("numpy-rows-int8", "int8", True, True, numpy_kernels.single_rows, numpy_kernels.available),
    Kernel("numpy-rows-int4", "int4", True, True, numpy_kernels.single_rows, numpy_kernels.available),
    Kernel("onnx-float32", "float32", False, True, onnx_kernels.float32, onnx_kernels.available),
    Kernel("onnx-int8", "int8", False, False, onnx_kernels.int8, onnx_kernels.available),
    Kernel("onnx-fine-int8", "int8", False, True, onnx_kernels.fine_int8, onnx_kernels.available),
    Kernel("onnx-int4", "int4", False, True, onnx_kernels.int4, onnx_kernels.available),
    Kernel("torch-float32", "float32", True, False, torch_kernels.float32, torch_kernels.available),
    Kernel("torch-int8", "int8", True, True, torch_kernels.int8, torch_kernels.available),
)
KERNELS = {kernel.name: kernel for kernel in _ALL}


def named(name: str, kind: Kind) -> Kernel:
    """The kernel of this name. Raises ExperimentError where there is none, for this kind, on this machine."""
    kernel = KERNELS.get(name)
    if kernel is None or kernel.kind != kind or not kernel.available():
        usable = ", ".join(one.name for one in KERNELS.values() if one.kind == kind and one.available())
        raise ExperimentError(f"There is no kernel {name!r} for {kind} on this machine; name one of {usable}.")
    return kernel


def suited(kernel: Kernel, kind: Kind) -> Kernel:
    """The kernel itself, or one of its properties for the head of its shard, where that is of another `kind`."""
    if kind == kernel.kind or kind != HEADS[kernel.kind]:
        return kernel
    alike = [one for one in KERNELS.values() if (one.kind, one.streams) == (kind, kernel.streams) and one.available()]
    alike = [one for one in alike if one.invariant or not kernel.invariant]
    return min(alike, key=lambda one: one.name.startswith("numpy"))  # of the others the first


@plain_products
def choose(
    kind: Kind,
    *,
    streamed: bool = False,
    invariant: bool = False,
    shape: tuple[int, int] = (5632, 2048),
    seconds: float = 1.0,
) -> Kernel:
    """The fastest kernel for matrices [rows, columns] like `shape`, one thread, measured for about `seconds` in all.

    Fastest is the least time for one row (a token that is generated) plus the time of a row among 64 (one of a prompt):
    as if a prompt had as many tokens as its answer. Kernels take turns, and every time is the least of many, on
    matrices too many to stay in a cache; of two that are alike the table's first wins. `streamed` and `invariant` admit
    only kernels with these properties; the latter is checked on this machine. Kernels that take the rows of a prompt
    one by one are only for who wants it `invariant`: no luck in a measurement makes up for such prompts.
    Raises ExperimentError for an empty shape.
    """
    if min(shape) < 1:
        raise ExperimentError(f"A matrix of {shape[0]} x {shape[1]} cannot be timed; give a shape of positive sizes.")
    fitting = [one for one in KERNELS.values() if one.kind == kind and one.available()]
    fitting = [one for one in fitting if one.streams or not streamed]
    fitting = [one for one in fitting if one.invariant or not invariant]
    fitting = [one for one in fitting if invariant or one.make is not numpy_kernels.single_rows]
    matrices = _matrices(kind, shape)
    linears: dict[str, list[Linear]] = {}
    for kernel in fitting:
        made = [kernel.prepare(matrix) for matrix in matrices]
        if not invariant or rows_alone(made[0], shape[1]):
            linears[kernel.name] = made
    times = _costs(linears, shape[1], seconds)
    return KERNELS[next(name for name, cost in times.items() if cost <= _ALIKE * min(times.values()))]


def rows_alone(linear: Linear, columns: int) -> bool:
    """Whether rows of y are the same to the bit alone and in company."""
    x = _inputs(PROMPT + 1, columns)
    alone = np.concatenate([linear(x[row : row + 1]) for row in range(len(x))])
    return all(np.array_equal(linear(x[:many]), alone[:many]) for many in (2, 8, 17, len(x)))


def _costs(linears: Mapping[str, Sequence[Linear]], columns: int, seconds: float) -> dict[str, float]:
    """Seconds per row by kernel, in the same order: what else goes on in the machine is borne by all."""
    one, many = _inputs(1, columns), _inputs(PROMPT, columns)
    left = dict(linears)
    single, among = dict.fromkeys(left, float("inf")), dict.fromkeys(left, float("inf"))
    costs: dict[str, float] = {}
    until, rounds = time.perf_counter() + seconds, 0
    while rounds < _ROUNDS or time.perf_counter() < until:
        for name, made in left.items():
            single[name] = min(single[name], *(_seconds(linear, one) for linear in made))
            among[name] = min(among[name], _seconds(made[rounds % len(made)], many))
            costs[name] = single[name] + among[name] / PROMPT
        left = {name: made for name, made in left.items() if costs[name] <= _HOPELESS * min(costs.values())}
        rounds += 1
    return costs


def _seconds(linear: Linear, x: Array) -> float:
    """Of one product."""
    start = time.perf_counter()
    linear(x)
    return time.perf_counter() - start


def _matrices(kind: Kind, shape: tuple[int, int]) -> list[Matrix]:
    """Distinct random matrices, one at least."""
    rows, columns = shape
    most_bytes = min(_APART_BYTES, room_bytes() / _PART_OF_ROOM)
    random = np.random.default_rng(0)
    found: list[Matrix] = []
    while len(found) < _MOST and sum(one.data.nbytes for one in found) < most_bytes:
        if kind == "float32":
            found.append(Matrix(kind, rows, columns, random.standard_normal(shape, np.float32)))
        elif kind == "int8":
            data = random.integers(-127, 128, shape, np.int8)
            found.append(Matrix(kind, rows, columns, data, np.full(rows, 0.01, np.float32)))
        else:
            data = random.integers(0, 256, (rows, blocks(columns), 16), np.uint8)
            data.reshape(rows, -1)[:, -(-columns // 2) :] = 0x88
            found.append(Matrix(kind, rows, columns, data, np.full(data.shape[:2], 0.01, np.float32)))
    return found


def _inputs(rows: int, columns: int) -> Array:
    return np.random.default_rng(1).standard_normal((rows, columns), np.float32)


def _zeros(rows: int) -> Linear:
    return lambda x: np.zeros((len(x), rows), np.float32)


def _biased(multiply: Linear, bias: Array) -> Linear:
    def linear(x: Array) -> Array:
        y = multiply(x)
        y += bias
        return y

    return linear
