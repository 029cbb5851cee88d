"""Parameters as one flat float32 vector `[d]` and the layout that names its parts.

Owns the order, shapes and offsets of a model's tensors, and the hash by which two sides know they mean the same model.
Must never import a framework: trainers turn modules into a `Layout` and back.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import ModelError

Vector = NDArray[np.float32]
Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the tensors in a flat float32 vector, and the buffers carried beside it.

    The first `trainable` elements are parameters, the rest float buffers (batch-norm statistics). Non-float buffers
    (counters) are `buffers`: they stay what the model factory made them and are never averaged.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    trainable: int
    buffers: Mapping[str, Array] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(arrays: Mapping[str, Array] | Iterable[tuple[str, Array]]) -> "Layout":
        """A layout of float arrays, all trainable, in the order given. Raises ModelError where there are none."""
        items = list(arrays.items() if isinstance(arrays, Mapping) else arrays)
        shapes = tuple(tuple(array.shape) for _, array in items)
        return Layout(tuple(name for name, _ in items), shapes, sum(map(prod, shapes)))

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names) or len(self.names) != len(self.shapes):
            raise ModelError("A model needs at least one tensor, and each name once.")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins, and the total at the end; in elements."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + prod(shape))
        return tuple(ends)

    @property
    def size(self) -> int:
        """d, in elements."""
        return self.offsets[-1]

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names and shapes; equal hashes mean interchangeable vectors."""
        lines = [f"{name}\t{','.join(map(str, shape))}\tfloat32" for name, shape in zip(self.names, self.shapes)]
        return hashlib.sha256("\n".join([*lines, str(self.trainable)]).encode()).hexdigest()

    def flatten(self, arrays: Mapping[str, Array]) -> Vector:
        """The tensors as one new vector. Raises ModelError where a name or a shape differs."""
        for name, shape in zip(self.names, self.shapes):
            if name not in arrays or tuple(arrays[name].shape) != shape:
                found = tuple(arrays[name].shape) if name in arrays else "nothing"
                raise ModelError(f"Tensor {name!r} should have shape {shape} but is {found}; use the same model code.")
        parts = [np.asarray(arrays[name], np.float32).reshape(-1) for name in self.names]
        return np.concatenate(parts)

    def unflatten(self, vector: Vector) -> dict[str, Vector]:
        """Views into `vector`, by name."""
        if vector.shape != (self.size,):
            raise ModelError(f"The vector has {vector.shape} elements where the layout has {self.size}.")
        cuts = zip(self.names, self.shapes, self.offsets, self.offsets[1:])
        return {name: vector[start:end].reshape(shape) for name, shape, start, end in cuts}
