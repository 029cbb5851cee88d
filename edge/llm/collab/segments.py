"""The device's half of a model: a line of segments, each a few layers, in front of rows that may wait between them.

A token that an exit answers needs no layer above that exit to be known, but later tokens need its keys and values. So
its row waits in front of the next segment, and goes through together with the rows of later tokens, the weights being
read once for all. Keys, values and states are those of the full model, whatever is put off. Owns the rows that wait
and the keys and values of one sequence. Must never choose a token or know of a cloud.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.ranks.rank import Blocks, Linear, Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.shard import Shard


class Segments:
    """Shards of consecutive layers from the first on; the last one has the head. One sequence of up to `context`.

    `blocks` opens the weights of a shard. Raises ModelError for shards that are no such line, and ExperimentError where
    there is no room; then what was opened is closed again.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        blocks: Callable[[Shard], Blocks],
        *,
        context: int,
        limits: LlmLimits = LlmLimits(),
    ) -> None:
        _check(shards)
        self.config, self.context = shards[0].config, context
        self.ends = tuple(shard.layers.stop for shard in shards)
        self._embed, self._most = shards[0].embed, limits.max_step_tokens
        self._opened: list[Blocks] = []
        self._ranks: list[Rank] = []
        with contextlib.ExitStack() as opened:
            for shard in shards:
                self._opened.append(blocks(shard))
                opened.callback(self._opened[-1].close)
                self._ranks.append(Rank(shard, self._opened[-1], Alone(), slots=1, context=context, limits=limits))
                opened.callback(self._ranks[-1].close)
            self._closing = opened.pop_all()
        self._head = next(block.index for block in shards[-1].blocks if block.part == "head")
        self._waiting = [
            _Rows(self.config.hidden) for _ in range(len(shards) + 1)
        ]  # in front of each segment, and behind the last

    @property
    def length(self) -> int:
        """Positions that have been fed."""
        return self._waiting[0].stop

    @property
    def deferred(self) -> int:
        """How many positions have not passed the last segment yet."""
        return self.length - self._waiting[-1].stop

    def feed(self, tokens: Sequence[int]) -> None:
        """The next tokens of the sequence: they wait in front of the first segment. Raises DataError for no tokens."""
        self._waiting[0].put(self._embed(tokens))

    def reach(self, segment: int) -> Array:
        """Let all rows that wait pass up to segment number `segment`, and it too.

        The rows [n, hidden] float32 that have passed it now, the last position's last; none where none waited.
        """
        for number in range(segment):
            self._through(number)
        return self._through(segment)

    def head(self, z: Array) -> Array:
        """Logits [n, vocab] of rows z [n, hidden] that are normalised already: what all exits share."""
        blocks = self._opened[-1]
        try:
            return cast("Linear", blocks.take(self._head)["head"])(z)
        finally:
            blocks.release(self._head)

    def take_states(self) -> tuple[int, Array]:
        """The states behind the last segment that nobody has taken yet: their first position, and rows [n, hidden]."""
        return self._waiting[-1].take()

    def back(self, length: int) -> None:
        """Forget all positions from `length` on, wherever their rows are; what was taken stays with who took it."""
        for rows in self._waiting:
            rows.cut(length)

    def clear(self) -> None:
        """Begin another sequence, and give the memory of the last one back."""
        for rank in self._ranks:
            rank.cache.free(0)
        self.back(0)

    def close(self) -> None:
        """Give all memory back. May be called twice."""
        self._closing.close()

    def _through(self, number: int) -> Array:
        """All rows that wait in front of one segment pass it, in steps of bounded size."""
        waiting, behind = self._waiting[number], self._waiting[number + 1]
        start, rows = waiting.peek()
        passed = []
        for first in range(0, len(rows), self._most):
            part = rows[first : first + self._most]
            passed.append(self._ranks[number].forward(Step((Part(0, start + first, len(part)),)), part))
            waiting.drop(len(part))
            behind.put(passed[-1])
        return np.concatenate(passed) if passed else rows


class _Rows:
    """Rows of consecutive positions, from `start` to `stop`, that wait in one place."""

    def __init__(self, hidden: int) -> None:
        self.start = self.stop = 0
        self._none: Array = np.empty((0, hidden), np.float32)
        self._rows: list[Array] = []

    def put(self, rows: Array) -> None:
        """The next positions' rows."""
        self._rows.append(rows)
        self.stop += len(rows)

    def peek(self) -> tuple[int, Array]:
        """The first position, and all rows."""
        if len(self._rows) > 1:
            self._rows = [np.concatenate(self._rows)]
        return self.start, self._rows[0] if self._rows else self._none

    def drop(self, count: int) -> None:
        """The first `count` rows are gone."""
        _, rows = self.peek()
        self.start += count
        self._rows = [rows[count:]] if self.start < self.stop else []

    def take(self) -> tuple[int, Array]:
        """As `peek`, and none is left."""
        start, rows = self.peek()
        self.start, self._rows = self.stop, []
        return start, rows

    def cut(self, length: int) -> None:
        """Positions from `length` on are gone."""
        if length < self.stop:
            _, rows = self.peek()
            self.start, self.stop = min(self.start, length), length
            self._rows = [rows[: self.stop - self.start]] if self.start < self.stop else []


def _check(shards: Sequence[Shard]) -> None:
    """Raises ModelError."""
    ends = [0, *(shard.layers.stop for shard in shards)]
    fits = all(shard.layers.start == end and len(shard.layers) and shard.ranks == 1 for shard, end in zip(shards, ends))
    one = len({shard.model for shard in shards}) == 1
    if not (fits and one and any(block.part == "head" for block in shards[-1].blocks)):
        raise ModelError("These shards are no line of segments of one model with a head at its end; cut it again.")
