"""What the system is told of a mapped file's pages: bring them, let them go, expect no order.

Owns the rounding to pages, which on some systems are larger than those that files here are laid out in, and the call
itself: Python's own holds all threads up while a disk reads, this one does not. Must never be given memory that is no
file's: what is let go there is lost.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from functools import cache

import numpy as np

PAGE = mmap.PAGESIZE  # 16 KiB on a Raspberry Pi 5
_RANDOM, _DONTNEED, _POPULATE_READ = 1, 4, 22  # as Linux numbers them; the last since 5.14


def fetch(mapped: memoryview, offset: int, size: int) -> None:
    """Have these bytes of a map in memory, and mapped; other threads run meanwhile. `mapped` is always a whole map.

    Raises OSError where the system cannot do that, or not read the file there.
    """
    _advise(mapped, *outward(offset, size), _POPULATE_READ)


def drop(mapped: memoryview, offset: int, size: int) -> None:
    """Pages with any of these bytes leave this process; one that is used again comes back by itself."""
    with contextlib.suppress(OSError):
        _advise(mapped, *outward(offset, size), _DONTNEED)


def scattered(mapped: memoryview, offset: int, size: int) -> None:
    """These bytes are read here and there: what lies beside need not come along. The page of those before stays out."""
    first = -(-offset // PAGE) * PAGE
    with contextlib.suppress(OSError):
        _advise(mapped, first, offset + size - first, _RANDOM)


def outward(offset: int, size: int) -> tuple[int, int]:
    """Offset and size of the whole pages around these bytes; none for none."""
    begin = offset - offset % PAGE
    return begin, -(-(offset + size - begin) // PAGE) * PAGE if size > 0 else 0


def _advise(mapped: memoryview, begin: int, size: int, what: int) -> None:
    if size <= 0 or not isinstance(mapped.obj, mmap.mmap):
        return
    call = _madvise()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    held = np.frombuffer(mapped, np.uint8)  # so it stays mapped, whatever other threads do
    if call(held.ctypes.data + begin, min(size, len(held) - begin), what):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        found = ctypes.CDLL(None, use_errno=True).madvise
        found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
        return found
    return None
