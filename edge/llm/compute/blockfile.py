"""Ranges of a shard's file in memory, one after the other and over and over.

Where the system's cache has room for the whole file, its pages are lent, by mapping them: nothing is copied. Else they
are read into buffers, past the cache (O_DIRECT) or through it. Owns the file's descriptor, and noticing that the file
is no longer what it was when the shard was opened. Must never keep what it read or mapped.
"""

import contextlib
import mmap
import os
from typing import Protocol

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.models import advice
from fedge.edge.llm.shards.shard import BlockSpec, Shard, state_of

PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class Blocks(Protocol):
    """A file open for reading. All raise ModelError where it cannot be read, or has been changed."""

    def copy(self, block: BlockSpec, buffer: Array) -> None:
        """Fill the start of `buffer`, which begins at a page and is whole pages, with the block's bytes."""

    def read(self, block: BlockSpec, buffer: Array) -> None:
        """Have the block in memory, perhaps in `buffer`, which is as `copy` wants it."""

    def place(self, block: BlockSpec, buffer: Array) -> Array:
        """Where the block lies once it has been read, uint8 [>= block.bytes]."""

    def drop(self, block: BlockSpec) -> None:
        """The block is not needed until it is read again."""

    def close(self) -> None:
        """Give the file back. May be called twice."""


class BlockFile:
    """Blocks that are copied into the buffer; see `Blocks`. `keep`: the cache may keep them, too.

    Raises ModelError where the file cannot be opened so.
    """

    def __init__(self, shard: Shard, *, direct: bool, keep: bool = False) -> None:
        self.path, self.direct, self.keep = shard.path, direct, keep
        path, self._state = shard.path, shard.state
        if direct and not _DIRECT:
            raise ModelError(f"{path} cannot be read past the cache on this system; choose buffered reading.")
        try:
            self._handle = os.open(path, os.O_RDONLY | (_DIRECT if direct else 0))
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error}); choose buffered reading or export it again.") from error
        try:
            self.check()
        except ModelError:
            self.close()
            raise

    def copy(self, block: BlockSpec, buffer: Array) -> None:
        """See `Blocks`."""
        view, at = buffer.data, 0
        size = min(-(-block.bytes // PAGE) * PAGE, len(view)) if self.direct else block.bytes
        try:
            while at < block.bytes:
                got = os.preadv(self._handle, [view[at:size]], block.offset + at)
                if not got:
                    raise ModelError(f"{self.path} ends within block {block.index}; export it again and start anew.")
                at += got
            self.check()
            if not (self.direct or self.keep) and hasattr(os, "posix_fadvise"):  # macOS has none
                os.posix_fadvise(self._handle, block.offset, block.bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error}); check the disk or export it again.") from error

    def read(self, block: BlockSpec, buffer: Array) -> None:
        """As `copy`. See `Blocks`."""
        self.copy(block, buffer)

    def place(self, _: BlockSpec, buffer: Array) -> Array:
        """The buffer. See `Blocks`."""
        return buffer

    def drop(self, block: BlockSpec) -> None:
        """Nothing: the buffer is used again. See `Blocks`."""

    def check(self) -> None:
        """Raises ModelError where the file is not what it was any more."""
        try:
            same = state_of(self._handle) == self._state
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error}); check the disk or export it again.") from error
        if not same:
            raise ModelError(f"{self.path} has been changed while it is in use; start the rank again.")

    def close(self) -> None:
        """See `Blocks`."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


class Lent:
    """Blocks that are the shard's own map, whose pages come from the cache while they are held. See `Blocks`.

    `file` reads through the cache. Raises ModelError where the system cannot map so many pages at once.
    """

    def __init__(self, file: BlockFile, mapped: memoryview) -> None:
        self._file, self._mapped = file, mapped
        self._bytes = np.frombuffer(mapped, np.uint8)
        try:
            advice.fetch(mapped, 0, PAGE)
        except OSError as error:
            raise ModelError(f"{file.path} cannot be lent ({error}); read it.") from error

    def copy(self, block: BlockSpec, buffer: Array) -> None:
        """What stays in memory must stay what it is, whatever becomes of the file. See `Blocks`."""
        self._file.copy(block, buffer)

    def read(self, block: BlockSpec, _: Array) -> None:
        """See `Blocks`."""
        try:
            advice.fetch(self._mapped, block.offset, block.bytes)
        except OSError as error:
            self._file.check()  # what was cut off cannot be fetched either
            raise ModelError(f"{self._file.path} cannot be read ({error}); check the disk.") from error
        self._file.check()

    def place(self, block: BlockSpec, _: Array) -> Array:
        """Its pages. See `Blocks`."""
        return self._bytes[block.offset : block.offset + block.bytes]

    def drop(self, block: BlockSpec) -> None:
        """The pages are the cache's alone again. See `Blocks`."""
        advice.drop(self._mapped, block.offset, block.bytes)

    def close(self) -> None:
        """See `Blocks`. Blocks that were read and not taken leave memory, too."""
        advice.drop(self._mapped, 0, len(self._mapped))
        self._file.close()


def open_blocks(shard: Shard, largest: BlockSpec, memory_bytes: int, direct: bool | None) -> Blocks:
    """The shard's file, read past the cache or through it; None: the best here, beside `memory_bytes` of the process's.

    What the cache has is there at once, as long as the whole file finds room in memory. Where it does not, it would
    only push out other things, so then reads go past the cache if that is possible. Raises ModelError.
    """
    if direct:
        return BlockFile(shard, direct=True)
    through = BlockFile(shard, direct=False)
    # Nobody here knows which of the ranks run on this machine, and what the cache holds for one counts as room to all
    # others: so there must be room for the files of all, though on a device that is alone less would do.
    through.keep = room_bytes() - memory_bytes > shard.ranks * len(shard.mapped)
    if direct is False:
        return through
    with contextlib.suppress(ModelError):  # some systems refuse it
        if through.keep:
            return Lent(through, shard.mapped)
        past = _past(shard, largest)
        through.close()
        return past
    return through


def pages(size: int) -> Array:
    """Whole pages of fresh memory for at least `size` bytes, uint8. Raises ModelError where there is none."""
    whole = max(-(-size // PAGE), 1) * PAGE
    try:
        return np.frombuffer(mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        raise ModelError(
            f"{whole} bytes for weights cannot be had ({error}); allow this process more memory."
        ) from error


def _past(shard: Shard, largest: BlockSpec) -> BlockFile:
    """The file, read past the cache; some file systems tell only when they read that they cannot."""
    past = BlockFile(shard, direct=True)
    try:
        past.copy(largest, pages(largest.bytes))
    except ModelError:
        past.close()
        raise
    return past
