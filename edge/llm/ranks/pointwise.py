"""What a rank computes besides matrix products and attention: RMSNorm, the SiLU gate, and the turn by position.

Owns the arithmetic, in float32 and as far as possible in place: at one token, calls cost more than numbers. Must never
hold state.
"""

from dataclasses import dataclass

import numpy as np

from fedge.core.params import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Rows x [..., n] over the root of its mean square, times weight [n]; a new array (arXiv 1910.07467, section 4)."""
    scaled: Array = x * x
    length = np.sqrt(np.add.reduce(scaled, axis=-1, keepdims=True) / x.shape[-1] + eps)
    np.divide(x, length, out=scaled)
    scaled *= weight
    return scaled


def gate(gate_up: Array) -> Array:
    """SiLU(first half) * second half of gate_up [tokens, 2 n]: a new array [tokens, n] (arXiv 2002.05202).

    As SiLU(2 z) = z (1 + tanh z), because exp overflows for large negative numbers and tanh does not.
    """
    half = gate_up.shape[1] // 2
    z = gate_up[:, :half] * np.float32(0.5)
    gated: Array = np.tanh(z)
    gated += 1
    gated *= z
    gated *= gate_up[:, half:]
    return gated


@dataclass(frozen=True, slots=True)
class Turn:
    """Cosines [tokens, 1, 1, head_dim / 2] and signed sines [tokens, 1, 2, head_dim / 2] of a step's positions."""

    cos: Array
    sin: Array

    @staticmethod
    def of(cos: Array, sin: Array) -> "Turn":
        """From tables [tokens, head_dim / 2] each."""
        return Turn(cos[:, None, None, :], np.stack((-sin, sin), axis=1)[:, None])

    def apply(self, heads: Array) -> None:
        """Turn heads [tokens, heads, head_dim] in place (arXiv 2104.09864, section 3.4.2).

        Pair i is numbers i and i + head_dim / 2, as in Hugging Face's models.
        """
        tokens, count, head_dim = heads.shape
        pairs = heads.reshape(tokens, count, 2, head_dim // 2)
        crossed = pairs[:, :, ::-1] * self.sin
        pairs *= self.cos
        pairs += crossed
