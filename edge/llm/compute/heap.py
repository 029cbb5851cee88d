"""Memory that was freed, back to the system: the C library keeps it for later, and a device has none to keep.

Owns the one call there is for it. Must never matter for what is computed.
"""

import contextlib
import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any


def trim() -> None:
    """Give back what this process has freed; nothing where the C library is not GNU's."""
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        found = ctypes.CDLL(None).malloc_trim
        found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
        return found
    return None
