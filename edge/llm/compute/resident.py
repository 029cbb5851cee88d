"""All weights of a shard in memory, prepared once.

With a kernel that streams they are the file's own pages, mapped: the system may drop them and fetch them again. With
one that copies they are private, and the pages of the file are given back, as is what the copying took besides: after
every block, so that little more than the weights is ever held. Must never read a block twice.
"""

import contextlib
import os
from dataclasses import replace

from fedge.core.lanes import plain_products
from fedge.core.params import Array
from fedge.edge.llm.compute import heap
from fedge.edge.llm.compute.kernels import Kernel, Linear, suited
from fedge.edge.llm.models import advice
from fedge.edge.llm.shards.layout import BlockSpec
from fedge.edge.llm.shards.quant import Matrix
from fedge.edge.llm.shards.shard import Shard


class Resident:
    """Blocks that are always there. Raises ModelError where the kernel is for another kind of weights."""

    def __init__(self, shard: Shard, kernel: Kernel) -> None:
        self._blocks: list[dict[str, Linear | Array]] = [{} for _ in shard.blocks]
        # The largest first, as long as there is room: copying takes as much again for a moment.
        for block in sorted(shard.blocks, key=lambda one: -one.bytes):
            found = shard.view(block, shard.mapped[block.offset : block.offset + block.bytes])
            self._blocks[block.index] = prepared(found if kernel.streams else _own(found), kernel)
            if not kernel.streams:
                _forget(shard, block)
        plain_products.__enter__()  # ranks on one machine that want more threads than cores come to a crawl
        self._open = True

    def take(self, index: int) -> dict[str, Linear | Array]:
        """The block's arrays and linear maps."""
        return self._blocks[index]

    def release(self, index: int) -> None:
        """Nothing: the block stays."""

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self._blocks = []
        if self._open:
            self._open = False
            heap.trim()
            plain_products.__exit__()


def prepared(found: dict[str, Matrix | Array], kernel: Kernel) -> dict[str, Linear | Array]:
    """A block's views with linear maps instead of matrices."""
    return {
        name: suited(kernel, one.kind).prepare(one) if isinstance(one, Matrix) else one for name, one in found.items()
    }


def _own(found: dict[str, Matrix | Array]) -> dict[str, Matrix | Array]:
    """Vectors copied: they are used at every token, and one that comes from the disk brings its neighbours with it."""
    return {
        name: replace(one, bias=None if one.bias is None else one.bias.copy())
        if isinstance(one, Matrix)
        else one.copy()
        for name, one in found.items()
    }


def _forget(shard: Shard, block: BlockSpec) -> None:
    """The block's pages leave this process and the system's cache, which a control group counts as this process's.

    What is still used comes back by itself.
    """
    advice.drop(shard.mapped, block.offset, block.bytes)
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError), shard.path.open("rb") as file:  # it may be gone, but is mapped
            os.posix_fadvise(file.fileno(), *advice.outward(block.offset, block.bytes), os.POSIX_FADV_DONTNEED)
    heap.trim()
