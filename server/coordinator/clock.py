"""The coordinator's clock: seconds since the run began, over all its processes, downtime left out.

Monotonic, so a jump of the wall clock moves no lease. Must never be read by the machine, which gets its time with each
event.
"""

import time


class Clock:
    """Goes on from `offset` seconds when it is made."""

    def __init__(self, offset: float = 0.0) -> None:
        self._zero = time.monotonic() - offset

    def now(self) -> float:
        """Seconds; never goes back."""
        return time.monotonic() - self._zero
