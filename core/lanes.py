"""Long vectors worked on in two threads, each with its own half; NumPy lets go of the interpreter's lock meanwhile.

The halves follow from the length alone, never from the machine, so a result is the same to the bit wherever it is
computed. Owns the only threads that algorithms cause. Must never know what the work is.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")


def halves(work: Callable[[int, int], T], size: int, block: int) -> list[T]:
    """[work(0, middle), work(middle, size)], at the same time; `middle` is a multiple of `block`.

    One call, in this thread, where one block holds everything.
    """
    if size <= block:
        return [work(0, size)]
    middle = -(-size // block // 2) * block
    other = _thread().submit(work, middle, size)
    first = work(0, middle)
    return [first, other.result()]


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fedge-lane")
