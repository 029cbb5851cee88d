"""A profile for whoever has none: each piece run a few times on noise.

Must never be taken for a measurement: `fedge.edge.runtime.measure` makes those.
"""

from collections.abc import Iterable

from fedge.edge.bundle import Bundle
from fedge.edge.plan.profile import Profile, piece_key
from fedge.edge.runtime.measure import profile_piece
from fedge.edge.runtime.sessions import Runner
from fedge.edge.runtime.tensors import example

RUNS = 3  # of each piece, the fastest counts


def quick(device: str, bundle: Bundle, runners: Iterable[Runner], threads: int) -> Profile:
    """Seconds per piece at a batch of one; no codings, so only `raw` can be planned with. Raises as `Runner.run`."""
    pieces = {
        piece_key(runner.piece.start, runner.piece.end): profile_piece(runner, example(runner.piece.inputs), RUNS)
        for runner in runners
    }
    return Profile(device, bundle.version, threads, pieces=pieces)
