"""Rotary positions: the angles of every pair of a head, stretched as long contexts need.

Owns the frequencies of the kinds in `config.Rope`. Must never hold state. All is computed in float32 as the models were
trained (angles at far positions depend on it), from frequencies found in float64.
"""

import math

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.models.config import Config, Rope


def frequencies(rope: Rope, head_dim: int) -> Array:
    """Radians per position of each pair, float32 [head_dim / 2]."""
    plain = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "default":
        return plain.astype(np.float32)
    stretched = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}[rope.kind]
    return stretched(rope, plain).astype(np.float32)


def tables(config: Config, positions: Array) -> tuple[Array, Array]:
    """Cosine and sine for each of the positions (integers [n]), each float32 [n, head_dim / 2]."""
    angles = np.outer(positions.astype(np.float32), frequencies(config.rope, config.head_dim))
    factor = np.float32(config.rope.attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def _linear(rope: Rope, plain: Array) -> Array:
    """Position interpolation (arXiv 2306.15595): all positions closer together."""
    return plain / rope.factor


def _llama3(rope: Rope, plain: Array) -> Array:
    """Llama 3.1 (arXiv 2407.21783): short waves stay, those longer than the old context stretch, others blend."""
    turns = rope.original_context * plain / (2 * math.pi)  # in the context the model was first trained for
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return keep * plain + (1 - keep) * plain / rope.factor


def _yarn(rope: Rope, plain: Array) -> Array:
    """YaRN (arXiv 2309.00071, section 3.2): a ramp, over the pairs, from those that stay to those that stretch."""
    pairs = len(plain)

    def pair(turns: float) -> float:
        """The pair that turns so often in the original context, as a fraction."""
        return pairs * math.log(rope.original_context / (turns * 2 * math.pi)) / math.log(rope.theta)

    low = max(math.floor(pair(rope.beta_fast)), 0)
    high = min(math.ceil(pair(rope.beta_slow)), 2 * pairs - 1)
    stretch = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0.0, 1.0)
    return stretch * plain / rope.factor + (1 - stretch) * plain
