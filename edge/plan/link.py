"""How fast the link to the cloud is, from what came back and how long it took.

The model is elapsed = time in the cloud + round trip + 8 * bytes / bandwidth. Pings tell the round trip, everything
else the bandwidth. State is explicit and time an argument. Must never send, wait or look at a clock.
"""

import math
import statistics
from dataclasses import dataclass, replace

from fedge.core.errors import ExperimentError

PING_BYTES = 512  # up to this size a message tells the round trip, above it the bandwidth
RTT_WINDOW_S = 60.0  # how long the smallest round trip is believed
PINGS = 16  # round trips kept
RATES = 5  # of the last so many transfers the median counts: three new ones outvote the old
NOISE_S = 2e-4  # the clock, the scheduler and gRPC are not more even than this
PROBE_S = 0.1  # a probe takes about this long: at one every 10 s, a hundredth of the link
MIN_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the planner sees it: bits per second, seconds for a message of no size there and back.

    Only what a device sends is timed, so the way down is taken to be as fast. Raises ExperimentError for a
    bandwidth that is not above 0 and a round trip below 0.
    """

    bandwidth_bps: float
    rtt_s: float

    def __post_init__(self) -> None:
        if not (self.bandwidth_bps > 0 and 0 <= self.rtt_s < math.inf):
            raise ExperimentError(
                f"A link of {self.bandwidth_bps} bit/s and {self.rtt_s} s there and back is none; "
                "give a bandwidth above 0 and a round trip of at least 0."
            )


OFFLINE = Link(bandwidth_bps=1.0, rtt_s=0.0)  # what to plan with where no cloud answers


@dataclass(frozen=True, slots=True)
class LinkState:
    """What is remembered: (when, seconds) of pings, (when, bits per second) of transfers, oldest first.

    `bound_bps` is set by the last failure until something comes through again. `ping_at` and `rate_at` are the times
    of the last news, good or bad, of each kind.
    """

    stale_s: float = 10.0
    pings: tuple[tuple[float, float], ...] = ()
    rates: tuple[tuple[float, float], ...] = ()
    bound_bps: float = math.inf
    ping_at: float = -math.inf
    rate_at: float = -math.inf


def observe(state: LinkState, size_bytes: int, elapsed_s: float, cloud_s: float, now: float) -> LinkState:
    """A message of `size_bytes` came back after `elapsed_s`, of which the cloud says it spent `cloud_s`.

    A claim of the cloud that cannot be true is cut to what can.
    """
    elapsed_s = _seconds(elapsed_s)
    network_s = elapsed_s - min(_seconds(cloud_s), elapsed_s)
    if size_bytes <= PING_BYTES:
        # Bytes that came through prove as much bandwidth, whatever a failure has told before.
        proven = max(state.bound_bps, 8 * size_bytes / max(network_s, NOISE_S))
        return replace(state, pings=_pings(state, network_s, now), bound_bps=proven, ping_at=now)
    faster = state.pings and network_s < _rtt_s(state)
    pings = _pings(state, network_s, now) if faster else state.pings
    rate = _rate(state, size_bytes, network_s)
    known = tuple((when, old) for when, old in state.rates if now - when < state.stale_s)
    return replace(state, pings=pings, rates=(*known, (now, rate))[-RATES:], bound_bps=math.inf, rate_at=now)


def fail(state: LinkState, size_bytes: int, timeout_s: float, now: float) -> LinkState:
    """A message of `size_bytes` did not come back within `timeout_s`: the link carries no more than that.

    What was measured before is forgotten, for the link has changed.
    """
    bound = 8 * max(size_bytes, 1) / max(_seconds(timeout_s), NOISE_S)
    link = estimate(state)
    bound = bound if link is None else min(bound, link.bandwidth_bps)
    return replace(state, rates=(), bound_bps=bound, ping_at=now, rate_at=now)


def estimate(state: LinkState) -> Link | None:
    """The link as far as it is known; None before the first transfer or failure."""
    bandwidth_bps = state.bound_bps
    if state.rates:
        bandwidth_bps = min(bandwidth_bps, statistics.median_low(rate for _, rate in state.rates))
    return Link(bandwidth_bps, _rtt_s(state)) if math.isfinite(bandwidth_bps) else None


def due(state: LinkState, now: float) -> bool:
    """Whether nothing has been heard of the round trip, or of the bandwidth, for `stale_s`: send a probe."""
    return now - min(state.ping_at, state.rate_at) >= state.stale_s


def probe_bytes(state: LinkState, now: float, most: int) -> int:
    """How large the probe that is due should be, at most `most`: a ping first, then about PROBE_S of the link."""
    if now - state.ping_at >= state.stale_s:
        return min(64, most)
    link = estimate(state)
    wanted = MIN_PROBE_BYTES if link is None else int(link.bandwidth_bps * PROBE_S / 8)
    return min(max(wanted, MIN_PROBE_BYTES), most)


def _rate(state: LinkState, size_bytes: int, network_s: float) -> float:
    """Bits per second of one transfer. One that drowns in the noise of the pings cannot lower the estimate."""
    transfer_s, noise_s = max(network_s - _rtt_s(state), 0.0), _noise_s(state)
    rate, link = 8 * size_bytes / max(transfer_s, noise_s), estimate(state)
    return rate if transfer_s > noise_s or link is None else max(rate, link.bandwidth_bps)


def _pings(state: LinkState, seconds: float, now: float) -> tuple[tuple[float, float], ...]:
    known = tuple((when, old) for when, old in state.pings if now - when < RTT_WINDOW_S)
    return (*known, (now, seconds))[-PINGS:]


def _rtt_s(state: LinkState) -> float:
    """The smallest round trip: queues and schedulers only ever add to it. 0 before the first."""
    return min((seconds for _, seconds in state.pings), default=0.0)


def _noise_s(state: LinkState) -> float:
    """How much of a transfer's time may be chance: twice the distance of the usual ping from the best."""
    if not state.pings:
        return NOISE_S
    middle = statistics.median(seconds for _, seconds in state.pings)
    return NOISE_S + 2 * (middle - _rtt_s(state))


def _seconds(figure: float) -> float:
    """A time as it may come from a peer, made one that is finite and not below 0."""
    return figure if math.isfinite(figure) and figure > 0 else 0.0
