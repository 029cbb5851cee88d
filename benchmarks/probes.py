"""One run by itself: how long it takes, how much memory it takes beside what is there, and that it ends.

Must never know what is run.
"""

import contextlib
import ctypes
import gc
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Work = Callable[[], object]
Prepare = Callable[[], Work]  # what comes before the work and does not count


def probed(prepare: Prepare) -> tuple[float, float | None]:
    """Seconds of a first run, and the memory in MiB that it took beside what was there; None where that is not told."""
    work = prepare()
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # or freed memory that is taken up again would not be seen
    before = _memory("VmRSS", reset=True)
    begun = time.perf_counter()
    work()
    seconds, peak = time.perf_counter() - begun, _memory("VmHWM")
    return seconds, None if before is None or peak is None else round(max(0.0, peak - before), 1)


def _memory(line: str, *, reset: bool = False) -> float | None:
    """MiB of this process now, or at most since the last reset; None where the system does not let itself be asked."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(one.split()[1]) / 1024 for one in lines if one.startswith(line)), None)


def itself(work: Work) -> Work:
    return work


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raises TimeoutError when they are over, once the call into a library that runs then has come back."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
