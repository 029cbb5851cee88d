"""Which of the devices that are there get which part of the model.

Owns the two ways: by the planner's prediction, or all devices by their speeds. Must never look at who is there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedge.edge.llm.group.messages import Offer
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.shards import planner
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shares import Share, balanced
from fedge.edge.plan.link import Link

HOPED = Link(bandwidth_bps=1e9, rtt_s=2e-4)  # of a link that was never measured: too slow ones show at the first try
_SLOWEST = 1e8  # weights per second, of a device that does not say


@dataclass(frozen=True, slots=True)
class Division:
    """Devices by rank, and what each holds. `token_s` is predicted; None where nothing was."""

    names: tuple[str, ...]
    shares: tuple[Share, ...]
    token_s: float | None = None


Divide = Callable[[Config, Kind, Sequence[Offer], Link, int], Division]


def planned(config: Config, kind: Kind, offers: Sequence[Offer], link: Link, kv_tokens: int) -> Division:
    """The planner's choice; the first offer is the head's. Raises ModelError where there is not the memory."""
    devices = [
        planner.Device(one.name, _speed(one, kind), one.memory_bytes, one.disk_bytes_per_s, one.layer_s)
        for one in offers
    ]
    choice = planner.plan(config, kind, devices, link, kv_tokens=kv_tokens).choice
    names = tuple(rank.device.name for rank in choice.ranks)
    return Division(names, tuple(rank.share for rank in choice.ranks), choice.token_s)


def everyone(config: Config, kind: Kind, offers: Sequence[Offer], _link: Link, _kv_tokens: int) -> Division:
    """All of them, in the order in which they came."""
    shares = balanced(config, [_speed(one, kind) for one in offers])
    return Division(tuple(one.name for one in offers), shares)


def _speed(offer: Offer, kind: Kind) -> float:
    return offer.weights_per_s.get(kind, _SLOWEST)
