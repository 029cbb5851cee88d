"""The states of one sequence at the layer where the cloud goes on, kept until the answer ends.

A cloud that has forgotten them can be told again. float16, as they are sent, unless they are sent exactly. Owns their
memory. Must never send.
"""

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array

_MOST_F16 = float(np.finfo(np.float16).max)
_ROOM = 64  # rows of the first piece of memory


class States:
    """Rows of positions 0 to `length`. `exact` keeps float32."""

    def __init__(self, hidden: int, *, exact: bool) -> None:
        self._rows: Array = np.empty((_ROOM, hidden), np.float32 if exact else np.float16)
        self.length = 0

    def put(self, start: int, rows: Array) -> None:
        """Rows [n, hidden] float32 from position `start` on, which replace what was known there and behind.

        Where float16 cannot hold one, all are float32 from then on. Raises ModelError for a number that is none.
        """
        if not 0 <= start <= self.length:
            raise ValueError(f"states from {start} on leave a gap behind {self.length}")
        if not np.isfinite(rows).all():
            raise ModelError("The model computed a state that is no number; check its weights, or use another kind.")
        if self._rows.dtype == np.float16 and np.abs(rows).max(initial=0.0) > _MOST_F16:
            self._rows = self._rows.astype(np.float32)
        self.length = start + len(rows)
        while self.length > len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[start : self.length] = rows

    def cut(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.length = min(self.length, length)

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop`, or to the end, as float32; a copy."""
        return self._rows[start : min(stop, self.length)].astype(np.float32)
