"""What a layer takes besides its products of weights: norms, rotation, attention and Python, of one token.

Owns the measurement, on a rank that computes for real but whose products cost nothing. Must never be run while a model
runs.
"""

import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.config import Config, Rope
from fedge.edge.llm.ranks.rank import Linear, Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.about import Share
from fedge.edge.llm.shards.layout import BlockSpec

_LAYERS, _TOKENS = 4, 128  # of context
_LEAST_ROUNDS = 4
# As a model of 1.1 billion weights has them (TinyLlama, arXiv 2401.02385); at one token, calls cost more than numbers.
_CONFIG = Config(
    "llama",
    layers=_LAYERS,
    hidden=2048,
    ffn=5632,
    heads=32,
    kv_heads=4,
    head_dim=64,
    vocab=1,
    context=2 * _TOKENS,
    eps=1e-5,
    rope=Rope(),
    tied=False,
    qkv_bias=False,
    o_bias=False,
    ffn_bias=False,
    qk_norm=False,
    window=0,
    bos=None,
    eos=(),
)


def layer_s(seconds: float) -> float:
    """Per layer, the least of as many tokens as `seconds` are enough for."""
    share = Share((0, _CONFIG.kv_heads), (0, _CONFIG.ffn))
    blocks = tuple(BlockSpec(index, index // 2, ("attn", "ffn")[index % 2], 0, 0) for index in range(2 * _LAYERS))
    shard = SimpleNamespace(config=_CONFIG, share=share, rank=0, blocks=blocks)
    rank = Rank(cast("Any", shard), _Free(), Alone(), slots=1, context=2 * _TOKENS)
    x, times = np.ones((1, _CONFIG.hidden), np.float32), [float("inf")]
    try:
        rank.forward(Step((Part(0, 0, _TOKENS),)), np.repeat(x, _TOKENS, axis=0))
        until = time.perf_counter() + seconds
        while len(times) <= _LEAST_ROUNDS or time.perf_counter() < until:
            begun = time.perf_counter()
            rank.forward(Step((Part(0, _TOKENS, 1),)), x)
            times.append(time.perf_counter() - begun)
    finally:
        rank.close()
    return min(times) / _LAYERS


class _Free:
    """Blocks whose products are ready before they are asked for."""

    def __init__(self) -> None:
        wide = _CONFIG.heads * _CONFIG.head_dim + 2 * _CONFIG.kv_heads * _CONFIG.head_dim
        widths = {"qkv": wide, "o": _CONFIG.hidden, "gate_up": 2 * _CONFIG.ffn, "down": _CONFIG.hidden}
        self._views: dict[str, Any] = {name: _ones(width) for name, width in widths.items()}
        self._views["norm"] = np.ones(_CONFIG.hidden, np.float32)

    def take(self, _index: int) -> dict[str, Any]:
        """The same for all."""
        return self._views

    def release(self, _index: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _ones(width: int) -> Linear:
    ready = {rows: np.ones((rows, width), np.float32) for rows in (1, _TOKENS)}

    def linear(x: Array) -> Array:
        return ready[len(x)]

    return linear
