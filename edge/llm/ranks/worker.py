"""The loop of every rank but rank 0: a step comes, is computed, and the next is awaited.

Owns nothing but the order. Must never see a token, nor go on after a fault: the group is made anew then.
"""

from typing import Protocol

from fedge.core.params import Array
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Step


class Steps(Protocol):
    """Where steps come from."""

    def receive_step(self) -> tuple[Step, Array] | None:
        """The next step and its embeddings [tokens, hidden]; None when rank 0 has ended."""


def serve_steps(rank: Rank, mesh: Steps) -> int:
    """Compute steps until rank 0 ends; returns how many. Raises RankLost for a step that cannot be, or a lost rank."""
    done = 0
    while (received := mesh.receive_step()) is not None:
        rank.forward(*received)
        done += 1
    return done
