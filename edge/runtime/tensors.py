"""The tensors that a piece takes: whether what came is what is wanted, and something that is. Must never compute."""

from collections.abc import Mapping

import numpy as np

from fedge.core.errors import RefusedTensor
from fedge.core.params import Array
from fedge.edge.bundle import Tensor


def check(tensors: tuple[Tensor, ...], inputs: Mapping[str, Array]) -> None:
    """Names, types and shapes are those of `tensors`. Raises RefusedTensor."""
    wanted = [tensor.name for tensor in tensors]
    if inputs.keys() != set(wanted):
        raise RefusedTensor(f"The piece takes {wanted}, not {sorted(map(str, inputs))[:8]}; send exactly these.")
    for tensor in tensors:
        array = inputs[tensor.name]
        dtype, shape = str(array.dtype), array.shape
        fits = len(shape) == len(tensor.shape) and all(
            extent > 0 and want in (extent, min(want, -1)) for extent, want in zip(shape, tensor.shape)
        )
        if dtype != tensor.dtype or not fits:
            want = f"{tensor.dtype} {list(tensor.shape)}"
            raise RefusedTensor(f"{tensor.name!r} must be {want} (below 0: any), but is {dtype} {list(shape)}.")


def example(tensors: tuple[Tensor, ...]) -> dict[str, Array]:
    """Something of the right names, types and shapes: noise, zeros for integers but bytes; free extents are 1."""
    generator = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for tensor in tensors:
        shape, kind = tuple(max(extent, 1) for extent in tensor.shape), np.dtype(tensor.dtype)
        if kind == np.uint8:
            made[tensor.name] = generator.integers(0, 256, shape, np.uint8)
        elif kind.kind == "f":
            made[tensor.name] = generator.standard_normal(shape).astype(kind)
        else:
            made[tensor.name] = np.zeros(shape, kind)
    return made
