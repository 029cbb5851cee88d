"""What rank 0 alone does: rows of the embedding before the layers, and final norm and vocabulary matrix after them.

Owns both ends of the model. Must never see more of the embedding than the rows it is asked for, nor choose a token.
"""

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.llm.ranks.pointwise import rms_norm
from fedge.edge.llm.ranks.rank import Blocks
from fedge.edge.llm.shards.shard import Shard


class Head:
    """The ends of a shard that has them. Raises ModelError for one that has no vocabulary matrix."""

    def __init__(self, shard: Shard, blocks: Blocks) -> None:
        self._shard, self._blocks = shard, blocks
        found = [block for block in shard.blocks if block.part == "head"]
        if not found:
            raise ModelError("This shard has no vocabulary matrix; give rank 0 the shard with its number.")
        self._index = found[0].index

    def embed(self, ids: Array) -> Array:
        """[n, hidden] float32 for token ids [n]. Raises DataError for an id that the vocabulary has not."""
        return self._shard.embed(ids)

    def logits(self, x: Array) -> Array:
        """[n, vocab] float32 for rows x [n, hidden] of the last layer."""
        if not len(x):
            return np.empty((0, self._shard.config.vocab), np.float32)
        views = self._blocks.take(self._index)
        try:
            logits: Array = views["head"](rms_norm(x, views["norm"], self._shard.config.eps))
            return logits
        finally:
            self._blocks.release(self._index)
