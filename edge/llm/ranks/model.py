"""Rank 0: the model as the engine sees it, tokens in and logits out, wherever the layers are computed.

Owns the order of a step on rank 0: embed, tell the others, compute, go on to logits. Must never schedule or sample.
"""

from typing import Protocol

import numpy as np

from fedge.core.errors import DataError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.rank import Blocks, Group, Rank
from fedge.edge.llm.ranks.step import Step
from fedge.edge.llm.shards.shard import Shard


class Lead(Group, Protocol):
    """The mesh as rank 0 sees it."""

    @property
    def sent_bytes(self) -> int:
        """By this rank to all others, so far."""

    def send_step(self, step: Step | None, x: Array | None = None) -> None:
        """To all other ranks; None is the end."""


class Model:
    """Rank 0 of a mesh whose other ranks run `serve_steps`."""

    def __init__(
        self, shard: Shard, blocks: Blocks, mesh: Lead, *, slots: int, context: int, limits: LlmLimits = LlmLimits()
    ) -> None:
        self.config = shard.config
        self._mesh = mesh
        self._head = Head(shard, blocks)
        self._rank = Rank(shard, blocks, mesh, slots=slots, context=context, limits=limits)

    def run(self, step: Step, tokens: Array, rows: Array | None = None) -> Array:
        """Logits [rows, vocab] float32 for `rows` of the step's flattened `tokens`; None means the last of every part.

        Raises DataError for a token that the vocabulary has not or a row that the step has not, and RankLost for a
        step that cannot be or a lost rank. A step without parts computes nothing.
        """
        if rows is None:
            rows = np.cumsum([part.count for part in step.parts], dtype=np.int64) - 1
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < len(tokens):
            raise DataError(f"A row is outside the step's {len(tokens)}; ask for rows of the step's own tokens.")
        x = self._head.embed(np.asarray(tokens, np.int64))
        self._rank.check(step, x)
        self._mesh.send_step(step, x)
        x = self._rank.forward(step, x)
        return self._head.logits(x[rows])

    @property
    def sent_bytes(self) -> int:
        """What rank 0 has sent to the other ranks so far."""
        return self._mesh.sent_bytes

    def close(self) -> None:
        """End the other ranks' loops and give all memory back."""
        self._mesh.send_step(None)
        self._rank.close()
