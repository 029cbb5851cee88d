"""Everybody who is idle takes part."""

from dataclasses import dataclass

from fedge.strategies.contracts import Fleet


@dataclass(frozen=True, slots=True)
class All:
    """The whole fleet, in the order of names."""

    def select(self, fleet: Fleet, round_: int) -> list[str]:
        """All of `fleet.idle`."""
        return sorted(fleet.idle)
