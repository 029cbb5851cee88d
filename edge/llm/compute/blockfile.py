"""Ranges of a shard's file in memory, one after the other and over and over.

Where the system's cache has room for the whole file, its pages are lent, by mapping them: nothing is copied. Else they
are read into buffers, past the cache (O_DIRECT) or through it. Owns the file's descriptor, and noticing that the file
is no longer what it was. Must never keep what it read or mapped.
"""

import contextlib
import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.shards.shard import BlockSpec

PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14: map what is in the cache, and fetch what is not


class Blocks(Protocol):
    """A file open for reading. All raise ModelError where it cannot be read, or has been changed."""

    direct: bool  # past the cache

    def read(self, block: BlockSpec, buffer: Array) -> None:
        """Have the block in memory; `buffer` begins at a page and is whole pages."""

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

    def __init__(self, path: Path, *, direct: bool, keep: bool = False) -> None:
        self.path, self.direct, self.keep = path, direct, keep
        if direct and not _DIRECT:
            raise ModelError(f"{path} cannot be read past the cache on this system; choose buffered reading.")
        try:
            self._handle = os.open(path, os.O_RDONLY | (_DIRECT if direct else 0))
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error}); choose buffered reading or export it again.") from error
        self._state = self._fingerprint()

    @property
    def size(self) -> int:
        """Bytes of the file when it was opened."""
        return self._state[0]

    def read(self, block: BlockSpec, buffer: Array) -> None:
        """Fill the start of `buffer`. See `Blocks`."""
        view, at = buffer.data, 0
        size = min(-(-block.bytes // PAGE) * PAGE, len(view)) if self.direct else block.bytes
        try:
            while at < block.bytes:
                got = os.preadv(self._handle, [view[at:size]], block.offset + at)
                if not got:
                    raise ModelError(f"{self.path} ends within block {block.index}; export it again and start anew.")
                at += got
            self.check()
            if not (self.direct or self.keep):
                os.posix_fadvise(self._handle, block.offset, block.bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error}); check the disk or export it again.") from error

    def place(self, _: BlockSpec, buffer: Array) -> Array:
        """The buffer. See `Blocks`."""
        return buffer

    def drop(self, block: BlockSpec) -> None:
        """Nothing: the buffer is used again. See `Blocks`."""

    def check(self) -> None:
        """Raises ModelError where the file is not what it was any more."""
        if self._fingerprint() != self._state:
            raise ModelError(f"{self.path} has been changed while it is in use; start the rank again.")

    def map(self) -> mmap.mmap:
        """The whole file, not yet in memory."""
        return mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)

    def close(self) -> None:
        """See `Blocks`."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _fingerprint(self) -> tuple[int, int]:
        status = os.fstat(self._handle)
        return status.st_size, status.st_mtime_ns


class Lent:
    """Blocks that are mapped, while they are held, from the cache, where the whole `file` has room. See `Blocks`.

    Raises ModelError where the system cannot map so many pages at once.
    """

    direct = False

    def __init__(self, file: BlockFile) -> None:
        self._file = file
        self._map = file.map()
        self._bytes = np.frombuffer(self._map, np.uint8)
        try:
            self._map.madvise(_POPULATE_READ, 0, PAGE)
        except OSError as error:
            raise ModelError(f"{file.path} cannot be mapped ({error}); read it.") from error

    def read(self, block: BlockSpec, _: Array) -> None:
        """See `Blocks`."""
        self._file.check()
        try:
            self._map.madvise(_POPULATE_READ, block.offset, block.bytes)
        except OSError as error:
            raise ModelError(f"{self._file.path} cannot be read ({error}); check the disk.") from error

    def place(self, block: BlockSpec, _: Array) -> Array:
        """Its pages. See `Blocks`."""
        return self._bytes[block.offset : block.offset + block.bytes]

    def drop(self, block: BlockSpec) -> None:
        """The pages are the cache's alone again. See `Blocks`."""
        self._map.madvise(mmap.MADV_DONTNEED, block.offset, block.bytes)

    def close(self) -> None:
        """See `Blocks`. The mapping goes with the last view."""
        self._file.close()


def open_blocks(path: Path, largest: BlockSpec, memory_bytes: int, direct: bool | None) -> Blocks:
    """The file, read past the cache or through it; None: the best here, beside `memory_bytes` of the process's.

    What the cache has is there at once, as long as the whole file finds room in memory. Where it does not, it would
    only push out other things, so then reads go past the cache if that is possible. Raises ModelError.
    """
    if direct:
        return BlockFile(path, direct=True)
    through = BlockFile(path, direct=False)
    through.keep = room_bytes() - memory_bytes > through.size
    if direct is False:
        return through
    with contextlib.suppress(ModelError):  # some systems refuse it
        if through.keep:
            return Lent(through)
        past = BlockFile(path, direct=True)
        past.read(largest, pages(largest.bytes))
        through.close()
        return past
    return through


def pages(size: int) -> Array:
    """Whole pages of fresh memory for at least `size` bytes, uint8."""
    whole = max(-(-size // PAGE), 1) * PAGE
    return np.frombuffer(mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
