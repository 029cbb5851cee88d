"""Keys and values of the sequences a rank works on: one anonymous mapping per slot, committed page by page as it fills.

Owns the memory of slots, and the check that a step asks only for slots and positions that exist. A slot is
float32 [layers, 2 (keys, values), kv_heads, context, head_dim], for the rank's own heads and layers. A page that
was never written costs nothing. Must never compute.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from fedge.core.errors import ExperimentError, RankLost
from fedge.core.params import Array
from fedge.edge.llm.ranks.step import Copy, Step


class KVCache:
    """`slots` sequences of up to `context` tokens. `lengths` says how many positions of each slot are filled.

    `entries[slot][layer]` is [2, kv_heads, context, head_dim]. Raises ExperimentError where the system refuses the
    address space.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, *, slots: int, context: int) -> None:
        if slots < 1 or context < 1:
            raise ExperimentError(f"{slots} slots of {context} tokens hold no sequence; ask for one of each at least.")
        self.context = context
        self.lengths = [0] * slots
        shape = (layers, 2, kv_heads, context, head_dim)
        self._maps = [_reserve(4 * math.prod(shape)) for _ in range(slots)]
        self._slots: list[Array] = [
            np.zeros(shape, np.float32) if held is None else np.ndarray(shape, np.float32, held) for held in self._maps
        ]
        self.entries: Sequence[Sequence[Array]] = [[slot[layer] for layer in range(layers)] for slot in self._slots]

    def check(self, step: Step) -> None:
        """Raises RankLost where the step names a slot or a position that there is not; nothing has changed then."""
        lengths = dict(enumerate(self.lengths))
        for slot in step.free:
            self._known(slot)
            lengths[slot] = 0
        for copy in step.copies:
            self._known(copy.source)
            self._known(copy.target)
            if not 0 <= copy.count <= lengths[copy.source]:
                raise _lost(f"{copy.count} positions of slot {copy.source}, which holds {lengths[copy.source]}")
            lengths[copy.target] = copy.count
        for part in step.parts:
            self._known(part.slot)
            if not 0 <= part.start <= lengths[part.slot]:
                raise _lost(f"position {part.start} of slot {part.slot}, which holds {lengths[part.slot]}")
            if part.count < 1 or part.start + part.count > self.context:
                raise _lost(f"positions up to {part.start + part.count} of a context of {self.context}")

    def begin(self, step: Step) -> None:
        """Free and copy what a step says that `check` has passed, and count its tokens as there."""
        for slot in step.free:
            self.free(slot)
        for copy in step.copies:
            self.copy(copy)
        for part in step.parts:
            self.lengths[part.slot] = part.start + part.count

    def free(self, slot: int) -> None:
        """Forget the slot and give its pages back to the system, where that can be done (on Linux)."""
        self.lengths[slot] = 0
        held = self._maps[slot]
        if held is not None and hasattr(mmap, "MADV_DONTNEED"):
            held.madvise(mmap.MADV_DONTNEED)

    def copy(self, copy: Copy) -> None:
        """Let `target` begin with the first `count` positions of `source`, in all layers."""
        if copy.source != copy.target:
            source, target = self._slots[copy.source], self._slots[copy.target]
            target[:, :, :, : copy.count] = source[:, :, :, : copy.count]
        self.lengths[copy.target] = copy.count

    def close(self) -> None:
        """Let go of all memory; nothing may be asked afterwards."""
        self.entries, self._slots, self._maps, self.lengths = [], [], [], []

    def _known(self, slot: int) -> None:
        if not 0 <= slot < len(self.lengths):
            raise _lost(f"slot {slot} of {len(self.lengths)}")


def _reserve(size_bytes: int) -> mmap.mmap | None:
    """Address space that takes memory only where it is written; None for nothing.

    Private, because pages of a shared mapping outlive DONTNEED. No huge pages, because the first token of a head would
    commit 2 MiB. Raises ExperimentError.
    """
    if not size_bytes:
        return None
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(-1, size_bytes)
        held = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError, MemoryError) as error:
        raise ExperimentError(
            f"The system gives no {size_bytes} bytes for one sequence ({error}); ask for a shorter context."
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            held.madvise(mmap.MADV_NOHUGEPAGE)
    return held


def _lost(what: str) -> RankLost:
    return RankLost(f"A step asks for {what}; the device that sends steps must be told this rank's slots and context.")
