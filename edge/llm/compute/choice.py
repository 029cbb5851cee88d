"""Which kernel multiplies a shard's weights: the one that its user names, or the fastest for matrices of its model.

Owns that measurement's memory, one per process. Must never open a shard.
"""

from functools import cache

from fedge.core.limits import LlmLimits
from fedge.edge.llm.compute import heap, kernels
from fedge.edge.llm.compute.kernels import Kernel
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import Shard


def kernel_for(
    shard: Shard, name: str | None, limits: LlmLimits, *, streamed: bool = False, invariant: bool = False
) -> Kernel:
    """The kernel of this `name`; None measures, and admits `streamed` and `invariant` ones only, where told.

    Raises ExperimentError for a kernel that is not there.
    """
    if name:
        return kernels.named(name, shard.kind)
    config = shard.config
    shape = (config.ffn, config.hidden)  # the same for every division, so that a new one need not measure
    found = _fastest(shard.kind, streamed, invariant, shape, limits.kernel_s)
    heap.trim()  # what the measurement took
    return found


@cache
def _fastest(kind: Kind, streamed: bool, invariant: bool, shape: tuple[int, int], seconds: float) -> Kernel:
    return kernels.choose(kind, streamed=streamed, invariant=invariant, shape=shape, seconds=seconds)
