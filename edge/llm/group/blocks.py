"""From a shard's file to weights that multiply: which kernel, all of it resident or through a window.

Owns that choice, which is measured once per process. Must never know of other ranks.
"""

from functools import cache

from fedge.core.limits import LlmLimits
from fedge.edge.llm.compute import heap, kernels
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.compute.kernels import Kernel
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.compute.window import Window
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import Shard

_PART_OF_FREE = 0.8
_UNLIMITED = 1 << 50


def open_blocks(
    shard: Shard, memory_bytes: int, limits: LlmLimits, kernel: str | None = None, *, invariant: bool = False
) -> Resident | Window:
    """The shard's weights within `memory_bytes`; 0 means all of them in memory.

    `kernel` names one of kernels.KERNELS; None measures, and `invariant` ones only, where told. Raises ModelError where
    the memory is too small, and ExperimentError for a kernel that is not there.
    """
    streamed = 0 < memory_bytes < sum(block.bytes for block in shard.blocks)
    config = shard.config
    shape = (config.ffn, config.hidden)  # the same for every division, so that a new one need not measure
    if kernel:
        chosen = kernels.named(kernel, shard.kind)
    else:
        chosen = _fastest(shard.kind, streamed, invariant, shape, limits.kernel_s)
    heap.trim()  # what the measurement took, and the cutting of shards
    return Window(shard, chosen, memory_bytes, limits=limits) if streamed else Resident(shard, chosen)


def spare_bytes() -> int:
    """Of memory, what a device may be asked for where its user names no number."""
    return int(min(_PART_OF_FREE * room_bytes(), _UNLIMITED))


@cache
def _fastest(kind: Kind, streamed: bool, invariant: bool, shape: tuple[int, int], seconds: float) -> Kernel:
    return kernels.choose(kind, streamed=streamed, invariant=invariant, shape=shape, seconds=seconds)
