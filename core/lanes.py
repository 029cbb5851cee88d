"""Long vectors worked on in two threads, each with its own half; NumPy lets go of the interpreter's lock meanwhile.

The halves follow from the length alone, and matrix products get one thread each, so a result is the same to the bit
whatever the number of threads. (Products with threads of their own also come to a crawl where other processes want the
same cores.) Owns the only threads that algorithms cause. Must never know what the work is.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator
from functools import cache
from threading import Lock
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")


def halves(work: Callable[[int, int], T], size: int, block: int) -> list[T]:
    """[work(0, middle), work(middle, size)], at the same time; `middle` is a multiple of `block`.

    One call, in this thread, where one block holds everything.
    """
    with plain_products:
        if size <= block:
            return [work(0, size)]
        middle = -(-size // block // 2) * block
        other = _thread().submit(work, middle, size)
        first = work(0, middle)
        return [first, other.result()]


@cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "fedge-lane")


class _PlainProducts(ContextDecorator):
    """While anyone is within, matrix products of this process have one thread; then as many as before."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._within = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._limit = _controller().limit(limits=1, user_api="blas")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._limit.restore_original_limits()


plain_products = _PlainProducts()


@cache
def _controller() -> ThreadpoolController:
    import numpy as np  # noqa: F401 -- its library must be loaded to be found

    return ThreadpoolController()
