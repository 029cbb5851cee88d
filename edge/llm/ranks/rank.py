"""One rank's forward pass: its shard of every layer, and the two all-reduces that keep the ranks together.

Owns the order of a pass: norm, attention, sum over ranks, norm, feed-forward, sum over ranks (tensor parallelism as in
TPI-LLM, arXiv 2410.00531, section 3.1). Norms are computed by all, the rest by whoever holds the heads or columns.
Works on whatever layers the shard holds. Must never sample, schedule, or touch a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fedge.core.errors import RankLost
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.models.rope import tables
from fedge.edge.llm.ranks.attention import Attention
from fedge.edge.llm.ranks.kvcache import KVCache
from fedge.edge.llm.ranks.pointwise import Turn, gate, rms_norm
from fedge.edge.llm.ranks.step import Step
from fedge.edge.llm.shards.shard import Shard

Linear = Callable[[Array], Array]


class Blocks(Protocol):
    """Where a shard's weights come from, taken in order and over again."""

    def take(self, index: int) -> dict[str, Any]:
        """The block's arrays and linear maps; waits until they are there."""

    def release(self, index: int) -> None:
        """The block's memory may be used for another."""

    def close(self) -> None:
        """Stop reading ahead."""


class Group(Protocol):
    """The ranks that share the layers."""

    def allreduce(self, x: Array) -> Array:
        """The sum over ranks, the same bits on all; may be `x` itself."""

    def close(self) -> None:
        """Leave."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A step and what all layers need of it: rotations, and per part (slot, start, first row, row after the last)."""

    turn: Turn
    spans: tuple[tuple[int, int, int, int], ...]


class Rank:
    """A shard at work, with slots for sequences. `cache` is theirs. Raises ExperimentError where they find no room."""

    def __init__(
        self, shard: Shard, blocks: Blocks, mesh: Group, *, slots: int, context: int, limits: LlmLimits = LlmLimits()
    ) -> None:
        config, share = shard.config, shard.share
        self.config, self._blocks, self._mesh, self._limits = config, blocks, mesh, limits
        self._number = shard.rank
        self._kv = share.kv_heads[1] - share.kv_heads[0]
        self._queries = self._kv * config.group
        self._ffn = share.ffn[1] - share.ffn[0]
        self._work = tuple(block for block in shard.blocks if block.part != "head")
        self._first = self._work[0].layer if self._work else 0
        layers = len({block.layer for block in self._work})
        self.cache = KVCache(layers, self._kv, config.head_dim, slots=slots, context=context)
        self._attention = Attention(config.window)
        self._scale = np.float32(config.head_dim**-0.5)

    def forward(self, step: Step, x: Array) -> Array:
        """The x [tokens, hidden] float32 after the last layer, the same bits on all ranks; `x` itself is not changed.

        Raises RankLost for a step or an `x` that cannot be, before anything has changed, and what the mesh raises.
        """
        self.check(step, x)
        self.cache.begin(step)
        if not step.parts:
            return x
        x, work = x.copy(), self._pass(step)
        for block in self._work:
            views = self._blocks.take(block.index)
            try:
                if block.part == "attn":
                    partial = self._attend(x, views, block.layer - self._first, work)
                else:
                    partial = self._feed(x, views)
            finally:
                self._blocks.release(block.index)
            x += self._mesh.allreduce(partial)
        return x

    def check(self, step: Step, x: Array) -> None:
        """Raises RankLost where the step does not fit this rank; changes nothing."""
        tokens = step.tokens
        if tokens > self._limits.max_step_tokens or x.shape != (tokens, self.config.hidden) or x.dtype != np.float32:
            raise RankLost(
                f"A step of {tokens} tokens came with {x.dtype} {list(x.shape)}; run the same model on all devices.",
                self._number,
            )
        self.cache.check(step)

    def close(self) -> None:
        """Leave the mesh, stop reading, give all memory back."""
        self._mesh.close()
        self._blocks.close()
        self.cache.close()

    def _pass(self, step: Step) -> _Pass:
        spans, row = [], 0
        for part in step.parts:
            spans.append((part.slot, part.start, row, row + part.count))
            row += part.count
        positions = np.concatenate([np.arange(part.start, part.start + part.count) for part in step.parts])
        return _Pass(Turn.of(*tables(self.config, positions)), tuple(spans))

    def _attend(self, x: Array, views: dict[str, Any], layer: int, work: _Pass) -> Array:
        """This rank's heads: [tokens, hidden], to be summed over ranks."""
        if not self._kv:
            return self._nothing(x, views["o"], self.config.o_bias)
        tokens, queries, head_dim = len(x), self._queries, self.config.head_dim
        qkv = views["qkv"](rms_norm(x, views["norm"], self.config.eps)).reshape(
            tokens, queries + 2 * self._kv, head_dim
        )
        self._place(qkv[:, : queries + self._kv], views, work.turn)
        grouped = np.empty((self._kv, tokens, self.config.group, head_dim), np.float32)
        by_group = qkv[:, :queries].reshape(tokens, self._kv, self.config.group, head_dim)
        np.multiply(by_group.transpose(1, 0, 2, 3), self._scale, out=grouped)
        fresh = qkv[:, queries:].reshape(tokens, 2, self._kv, head_dim).transpose(1, 2, 0, 3)
        mixed = np.empty((tokens, self._kv, self.config.group, head_dim), np.float32)
        for slot, start, first, last in work.spans:
            entry = self.cache.entries[slot][layer]
            entry[:, :, start : start + last - first] = fresh[:, :, first:last]
            self._attention.attend(grouped[:, first:last], entry[0], entry[1], start, mixed[first:last])
        out: Array = views["o"](mixed.reshape(tokens, queries * head_dim))
        return out

    def _place(self, heads: Array, views: dict[str, Any], turn: Turn) -> None:
        """Normalise queries and keys, where the model does, and turn them by their positions; in place."""
        if self.config.qk_norm:
            queries, eps = self._queries, self.config.eps
            heads[:, :queries] = rms_norm(heads[:, :queries], views["q_norm"], eps)
            heads[:, queries:] = rms_norm(heads[:, queries:], views["k_norm"], eps)
        turn.apply(heads)

    def _feed(self, x: Array, views: dict[str, Any]) -> Array:
        """This rank's columns of the feed-forward network: [tokens, hidden], to be summed over ranks."""
        if not self._ffn:
            return self._nothing(x, views["down"], self.config.ffn_bias)
        down: Array = views["down"](gate(views["gate_up"](rms_norm(x, views["norm"], self.config.eps))))
        return down

    def _nothing(self, x: Array, last: Linear, bias: bool) -> Array:
        """Of an empty share: zeros, but rank 0 holds the bias of the sum."""
        return last(x[:, :0]) if bias and self._number == 0 else np.zeros_like(x)
