"""Ranges of a shard's file, read into memory that is used again and again.

Reads go past the system's cache (O_DIRECT) or through it. Owns the file's descriptor, and noticing that the file is no
longer what it was. Must never map the file, nor keep what it read.
"""

import contextlib
import mmap
import os
import time
from pathlib import Path

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.llm.compute.cgroup import room_bytes
from fedge.edge.llm.shards.shard import BlockSpec

PAGE = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockFile:
    """A file open for reading. `direct` reads past the cache; otherwise it may `keep` what is read, or not.

    Raises ModelError where it cannot be opened so.
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
        """Fill the start of `buffer`, which begins at a page and is whole pages. Raises ModelError."""
        view, at = buffer.data, 0
        size = min(-(-block.bytes // PAGE) * PAGE, len(view)) if self.direct else block.bytes
        try:
            while at < block.bytes:
                got = os.preadv(self._handle, [view[at:size]], block.offset + at)
                if not got:
                    raise ModelError(f"{self.path} ends within block {block.index}; export it again and start anew.")
                at += got
            if self._fingerprint() != self._state:
                raise ModelError(f"{self.path} has been changed while it is in use; start the rank again.")
            if not (self.direct or self.keep):
                os.posix_fadvise(self._handle, block.offset, block.bytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error}); check the disk or export it again.") from error

    def close(self) -> None:
        """Give the descriptor back. May be called twice."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _fingerprint(self) -> tuple[int, int]:
        status = os.fstat(self._handle)
        return status.st_size, status.st_mtime_ns


def open_blocks(path: Path, largest: BlockSpec, memory_bytes: int, direct: bool | None) -> BlockFile:
    """The file, read past the cache or not; None: whichever is faster here, beside `memory_bytes` of the process's.

    A second read through the cache is faster than any disk, as long as the whole file finds room in memory. Where it
    does not, it would only push out other things, so then reads go past the cache if the file system allows that.
    Raises ModelError.
    """
    if direct:
        return BlockFile(path, direct=True)
    through = BlockFile(path, direct=False)
    through.keep = room_bytes() - memory_bytes > through.size
    if direct is False:
        return through
    scratch = pages(largest.bytes)
    past_s, past = float("inf"), None
    with contextlib.suppress(ModelError):  # some file systems refuse it
        past = BlockFile(path, direct=True)
        past_s = _seconds(past, largest, scratch)
    if past_s == float("inf") or (through.keep and _seconds(through, largest, scratch) < past_s):
        chosen, other = through, past
    else:
        chosen, other = past or through, through
    if other is not None:
        other.close()
    return chosen


def pages(size: int) -> Array:
    """Whole pages of fresh memory for at least `size` bytes, uint8."""
    whole = max(-(-size // PAGE), 1) * PAGE
    return np.frombuffer(mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def _seconds(file: BlockFile, block: BlockSpec, scratch: Array) -> float:
    """Of the second read, when a cache has the block."""
    file.read(block, scratch)
    start = time.perf_counter()
    file.read(block, scratch)
    return time.perf_counter() - start
