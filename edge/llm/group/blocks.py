"""From a shard's file to weights that multiply: all of it resident, or through a window.

Owns that choice. Must never know of other ranks.
"""

from fedge.core.errors import ExperimentError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.compute import heap
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.compute.choice import kernel_for
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.compute.window import Window
from fedge.edge.llm.shards.shard import Shard

_PART_OF_FREE = 0.8
_UNLIMITED = 1 << 50


def open_blocks(
    shard: Shard, memory_bytes: int, limits: LlmLimits, kernel: str | None = None, *, invariant: bool = False
) -> Resident | Window:
    """The shard's weights within `memory_bytes`; 0 means all of them in memory.

    `kernel` names one of kernels.KERNELS; None measures, and `invariant` ones only, where told. Raises ModelError where
    the memory is too small, and ExperimentError for a kernel that is not there, or not `invariant` where that is told.
    """
    streamed = 0 < memory_bytes < sum(block.bytes for block in shard.blocks)
    chosen = kernel_for(shard, kernel, limits, streamed=streamed, invariant=invariant)
    if invariant and not chosen.invariant:
        raise ExperimentError(
            f"What {chosen.name} computes for one sequence depends on those that share its pass; the group is to be "
            "invariant, so name another kernel, or none."
        )
    heap.trim()  # what the cutting of shards took
    return Window(shard, chosen, memory_bytes, limits=limits) if streamed else Resident(shard, chosen)


def spare_bytes() -> int:
    """Of memory, what a device may be asked for where its user names no number."""
    return int(min(_PART_OF_FREE * room_bytes(), _UNLIMITED))
