"""Who is there, and how far each device is: a table of phases, and pure functions over it.

    FREE --load--> LOADING --ready--> READY --start--> RUNNING --end--> ENDING --broken--> FREE

A device that has not started when its epoch ends is free at once, since the next load replaces the last; one that has
must first say that it has noticed: until then it may hang. Time comes in as an argument. Must never send or wait.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from fedge.core.errors import RefusedClient
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group.messages import Hello


class Phase(StrEnum):
    """How far a device is in its epoch."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"
    RUNNING = "running"
    ENDING = "ending"


class Event(StrEnum):
    """What happens to a device."""

    LOAD = "load"
    READY = "ready"
    START = "start"
    BROKEN = "broken"
    END = "end"


TABLE: Mapping[tuple[Phase, Event], Phase] = {
    (Phase.FREE, Event.LOAD): Phase.LOADING,
    (Phase.LOADING, Event.READY): Phase.READY,
    (Phase.LOADING, Event.BROKEN): Phase.FREE,
    (Phase.LOADING, Event.END): Phase.FREE,
    (Phase.READY, Event.START): Phase.RUNNING,
    (Phase.READY, Event.BROKEN): Phase.FREE,
    (Phase.READY, Event.END): Phase.FREE,
    (Phase.RUNNING, Event.BROKEN): Phase.FREE,
    (Phase.RUNNING, Event.END): Phase.ENDING,
    (Phase.ENDING, Event.BROKEN): Phase.FREE,
}


@dataclass(frozen=True, slots=True)
class Member:
    """A device that is there. `epoch` is its last one; it is left out until `rest_until`, for the reason `detail`.

    `failures` counts how often it has failed since it was last met.
    """

    hello: Hello
    heard_at: float
    phase: Phase = Phase.FREE
    epoch: int = 0
    rest_until: float = -math.inf
    detail: str = ""
    failures: int = 0
    private_bytes: int = 0
    mapped_bytes: int = 0

    @property
    def name(self) -> str:
        """What it calls itself."""
        return self.hello.offer.name


Members = Mapping[str, Member]  # by name, in the order in which they came


def enter(members: Members, hello: Hello, now: float, limits: LlmLimits) -> Members:
    """With a device that has come; one of the same name is replaced. Raises RefusedClient where there are too many."""
    name = hello.offer.name
    if name not in members and len(members) + 1 >= limits.max_ranks:
        raise RefusedClient(f"The group has its {limits.max_ranks} devices; try again when one has left.")
    return {**{key: one for key, one in members.items() if key != name}, name: Member(hello, now)}


def leave(members: Members, name: str) -> Members:
    """Without one."""
    return {key: one for key, one in members.items() if key != name}


def happen(members: Members, name: str, event: Event, epoch: int) -> Members:
    """After an event of an epoch; one of another epoch, out of turn, or of a device that is gone changes nothing."""
    member = members.get(name)
    if member is None or (event != Event.LOAD and epoch != member.epoch):
        return members
    phase = TABLE.get((member.phase, event))
    return members if phase is None else {**members, name: replace(member, phase=phase, epoch=epoch)}


def rest(members: Members, name: str, until: float, detail: str) -> Members:
    """Left out until then."""
    member = members.get(name)
    return members if member is None else {**members, name: replace(member, rest_until=until, detail=detail)}


def fail(members: Members, name: str, now: float, detail: str, limits: LlmLimits) -> Members:
    """Left out after a failure: for `rest_s`, each time twice as long, at most `useless_s`."""
    member = members.get(name)
    if member is None:
        return members
    seconds = min(limits.rest_s * 2.0 ** min(member.failures, 32), max(limits.rest_s, limits.useless_s))
    members = {**members, name: replace(member, failures=member.failures + 1)}
    return rest(members, name, now + seconds, detail)


def met(members: Members, names: Sequence[str]) -> Members:
    """These work: their failures are forgotten."""
    return {name: replace(one, failures=0) if name in names else one for name, one in members.items()}


def heard(members: Members, name: str, now: float, private_bytes: int = 0, mapped_bytes: int = 0) -> Members:
    """A sign of life, which may say how much memory is in use."""
    member = members.get(name)
    if member is None:
        return members
    if private_bytes or mapped_bytes:
        member = replace(member, private_bytes=private_bytes, mapped_bytes=mapped_bytes)
    return {**members, name: replace(member, heard_at=now)}


def silent(members: Members, now: float, silence_s: float) -> tuple[str, ...]:
    """Those that have said nothing for too long."""
    return tuple(name for name, one in members.items() if now - one.heard_at > silence_s)


def usable(members: Members, now: float = math.inf) -> tuple[Member, ...]:
    """Those that can be given a shard; of all times, if they must, also those that rest."""
    return tuple(one for one in members.values() if one.phase == Phase.FREE and now >= one.rest_until)


def in_epoch(members: Members, epoch: int, *phases: Phase) -> tuple[str, ...]:
    """Those that are so far in this epoch."""
    return tuple(name for name, one in members.items() if one.epoch == epoch and one.phase in phases)
