"""The weights of a shard within a budget of memory: some blocks stay, the others pass through two buffers.

As in TPI-LLM (arXiv 2410.00531, section 3.3) a thread reads ahead while the rank computes, also into the next token;
the blocks that stay are spread evenly (its Proposition 6), so that the disk can keep up everywhere. One kernel
multiplies all blocks, one that streams, so that results are those of the same kernel without a window, to the bit.
Owns the budget, the buffers and the thread. Must never let the rank wait without end.
"""

import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence

from fedge.core.errors import FedgeError, ModelError
from fedge.core.lanes import plain_products
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.compute.blockfile import open_blocks, pages
from fedge.edge.llm.compute.kernels import Kernel, Linear
from fedge.edge.llm.compute.resident import prepared
from fedge.edge.llm.shards.shard import BlockSpec, Shard

BUFFERS = 2
_Views = dict[str, Linear | Array]


def pinned(sizes: Sequence[int], memory_bytes: int) -> frozenset[int]:
    """Which blocks stay in memory: the choice that leaves the fewest bytes to be read for every token.

    Blocks larger than some size stay, so that buffers need not hold them; of the others as many as fit, evenly spread.
    Raises ModelError where the budget is too small, with one that would do.
    """
    best: tuple[int, frozenset[int]] | None = None
    least = sum(sizes)
    for largest in sorted({0, *sizes}):
        kept = {index for index, size in enumerate(sizes) if size > largest}
        fixed = BUFFERS * largest + sum(sizes[index] for index in kept)
        least = min(least, fixed)
        if fixed <= memory_bytes:
            kept |= _spread(sizes, [index for index in range(len(sizes)) if index not in kept], memory_bytes - fixed)
            streamed = sum(size for index, size in enumerate(sizes) if index not in kept)
            if best is None or streamed < best[0]:
                best = streamed, frozenset(kept)
    if best is None:
        raise ModelError(
            f"{memory_bytes} bytes of memory beside keys and values cannot hold two blocks of the shard; allow {least} "
            "or more, fewer slots or a shorter context."
        )
    return best[1]


class Window:
    """Blocks taken in order, over and over, within `memory_bytes`. `direct`: see `blockfile.open_blocks`.

    A block that is taken out of order comes as well, only later. At most two streamed blocks may be held at a time.
    Raises ModelError where the budget is too small, the file cannot be read or is no longer the one that the shard was
    opened from, or the kernel does not stream.
    """

    def __init__(
        self,
        shard: Shard,
        kernel: Kernel,
        memory_bytes: int,
        direct: bool | None = None,
        *,
        limits: LlmLimits = LlmLimits(),
    ) -> None:
        if not kernel.streams:
            raise ModelError(f"The kernel {kernel.name!r} copies weights; choose one that streams for a window.")
        self._shard, self._kernel, self._limits = shard, kernel, limits
        stay = pinned([block.bytes for block in shard.blocks], memory_bytes)
        self._streamed = [block for block in shard.blocks if block.index not in stay]
        largest = max(self._streamed or shard.blocks, key=lambda block: block.bytes)
        self._file = open_blocks(shard, largest, memory_bytes, direct)
        try:
            self._buffers = [pages(largest.bytes) for _ in range(BUFFERS if self._streamed else 0)]
            self._pinned = {block.index: self._keep(block) for block in shard.blocks if block.index in stay}
        except BaseException:  # no memory, say: nobody else knows of the file
            self._file.close()
            raise
        self._views: dict[tuple[int, int], _Views] = {}
        self._held: OrderedDict[int, int] = OrderedDict()
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[BlockSpec, int] | FedgeError] = queue.SimpleQueue()
        self._failed: FedgeError | None = None
        self._closed = False
        for number in range(len(self._buffers)):
            self._free.put(number)
        self._thread = threading.Thread(target=self._read_ahead, name="fedge-window", daemon=True)
        plain_products.__enter__()
        if self._streamed:
            self._thread.start()

    def take(self, index: int) -> _Views:
        """The block's arrays and linear maps, which are right until it is released; waits until they are there.

        Raises ModelError where reading failed, took too long, or two other streamed blocks are held.
        """
        if self._failed or self._closed:
            raise self._failed or ModelError("The window is closed; open it again.")
        if index in self._pinned:
            return self._pinned[index]
        if not 0 <= index < len(self._shard.blocks):
            raise ModelError(f"The shard has no block {index}; it has {len(self._shard.blocks)}.")
        if index in self._held:
            return self._of(self._shard.blocks[index], self._held[index])
        if len(self._held) == BUFFERS:
            raise ModelError(f"Blocks {list(self._held)} are still in use; release one before block {index}.")
        block, number = self._next()
        while block.index != index:  # left out by the taker
            self._file.drop(block)
            self._free.put(number)
            block, number = self._next()
        self._held[index] = number
        return self._of(block, number)

    def release(self, index: int) -> None:
        """The block's memory may be read into."""
        number = self._held.pop(index, None)
        if number is not None:
            self._file.drop(self._shard.blocks[index])
            self._free.put(number)

    def close(self) -> None:
        """Stop reading, give memory back. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._free.put(None)
        self._ready.put(ModelError("The window has been closed; open it again."))  # for whoever waits
        if self._thread.is_alive():
            self._thread.join(self._limits.step_timeout_s)
        if not self._thread.is_alive():  # else the disk hangs, and the descriptor is still in use
            self._file.close()
        self._views, self._pinned, self._buffers = {}, {}, []
        plain_products.__exit__()

    def _keep(self, block: BlockSpec) -> _Views:
        memory = pages(block.bytes)
        self._file.copy(block, memory)
        return prepared(self._shard.view(block, memory), self._kernel)

    def _of(self, block: BlockSpec, number: int) -> _Views:
        """Views of a block in a buffer; they stay right when the buffer is filled again, so they are made once."""
        found = self._views.get((block.index, number))
        if found is None:
            found = prepared(self._shard.view(block, self._file.place(block, self._buffers[number])), self._kernel)
            self._views[block.index, number] = found
        return found

    def _next(self) -> tuple[BlockSpec, int]:
        try:
            got = self._ready.get(timeout=self._limits.step_timeout_s)
        except queue.Empty:
            got = ModelError(f"{self._shard.path} took over {self._limits.step_timeout_s} s to read; check the disk.")
        if isinstance(got, FedgeError):
            self._failed = got
            raise got
        return got

    def _read_ahead(self) -> None:
        """The thread: fills free buffers in the order of the blocks until it is told to stop or cannot."""
        buffers = self._buffers
        try:
            while True:
                for block in self._streamed:
                    number = self._free.get()
                    if number is None:
                        return
                    self._file.read(block, buffers[number])
                    self._ready.put((block, number))
        except FedgeError as error:
            self._ready.put(error)
        except Exception as error:  # whoever waits must be told of a mistake of ours too
            self._ready.put(ModelError(f"{self._shard.path} cannot be read ({error!r}); start the rank again."))


def _spread(sizes: Sequence[int], among: Sequence[int], budget: int) -> set[int]:
    """As many of these blocks as fit at even distances, then whichever still fit."""
    for many in range(len(among), -1, -1):
        chosen = {among[(2 * step + 1) * len(among) // (2 * many)] for step in range(many)}
        left = budget - sum(sizes[index] for index in chosen)
        if left >= 0:
            break
    for index in among:
        if index not in chosen and sizes[index] <= left:
            chosen.add(index)
            left -= sizes[index]
    return chosen
