"""The members as many threads see them: streams report, the head orders and waits.

Owns the lock around the table of membership.py and one queue of orders per device. Must never know of gRPC or shards.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fedge.core.errors import AddressError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group import membership
from fedge.edge.llm.group.membership import Event, Member, Members, Phase
from fedge.edge.llm.group.messages import Hello, clip, dismiss
from fedge.protos import llm_pb2 as pb

log = logging.getLogger("fedge")
T = TypeVar("T")
_POLL_S = 0.1  # how often silence is looked for while somebody waits
_MAX_ORDERS = 64  # that a device has not taken yet


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """One device's stream: the orders it has still to be sent, None being the last."""

    name: str
    orders: queue.SimpleQueue[pb.Order | None] = field(default_factory=queue.SimpleQueue)

    def put(self, order: pb.Order | None) -> None:
        """Nothing is lost but to a device that reads no more."""
        if self.orders.qsize() < _MAX_ORDERS:
            self.orders.put(order)
        elif self.orders.qsize() == _MAX_ORDERS:
            self.orders.put(None)

    def end(self, reason: str, detail: str) -> None:
        """Dismiss the device."""
        self.put(dismiss(reason, detail))
        self.put(None)


class Roster:
    """Any thread may call anything."""

    def __init__(self, limits: LlmLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._changed = threading.Condition()
        self._members: Members = {}
        self._seats: dict[str, Seat] = {}
        self._closed = False

    @property
    def members(self) -> Members:
        """At this moment."""
        with self._changed:
            self._expire()
            return self._members

    def enter(self, hello: Hello) -> Seat:
        """A stream begins. Raises RefusedClient where there are too many, AddressError once closed."""
        seat = Seat(hello.offer.name)
        with self._changed:
            if self._closed:
                raise AddressError("The head is about to end; try again when it is back.")
            self._expire()
            self._members = membership.enter(self._members, hello, self._clock(), self._limits)
            old = self._seats.get(seat.name)
            if old is not None:
                old.end(
                    "REPLACED",
                    f"Another device has come as {seat.name!r}; give each device a name of its own (--name).",
                )
            self._seats[seat.name] = seat
            self._changed.notify_all()
        log.info("%s has joined", seat.name)
        return seat

    def leave(self, seat: Seat) -> None:
        """A stream has ended."""
        with self._changed:
            if self._seats.get(seat.name) is seat:
                del self._seats[seat.name]
                self._members = membership.leave(self._members, seat.name)
                self._changed.notify_all()
                log.info("%s has left", seat.name)

    def report(self, seat: Seat, told: pb.Report) -> None:
        """What a device says, Hello aside; nothing where another has taken its name."""
        with self._changed:
            if self._seats.get(seat.name) is not seat:
                return
            beat = told.beat
            self._members = membership.heard(
                self._members, seat.name, self._clock(), beat.private_bytes, beat.mapped_bytes
            )
            if told.WhichOneof("event") == "ready":
                self._members = membership.happen(self._members, seat.name, Event.READY, told.ready.epoch)
            elif told.WhichOneof("event") == "broken":
                self._broken(seat.name, told.broken)
            self._changed.notify_all()

    def order(self, name: str, event: Event, epoch: int, order: pb.Order) -> None:
        """Tell a device what to do; nothing where it is gone."""
        with self._changed:
            self._members = membership.happen(self._members, name, event, epoch)
            if name in self._seats:
                self._seats[name].put(order)
            self._changed.notify_all()

    def end(self, epoch: int, names: Sequence[str]) -> None:
        """The head has ended this epoch: who only loaded for it gives that back, the others see their mesh end."""
        with self._changed:
            for name in membership.in_epoch(self._members, epoch, Phase.LOADING, Phase.READY):
                if name in self._seats:
                    self._seats[name].put(pb.Order(end=pb.End(epoch=epoch)))
            for name in names:
                self._members = membership.happen(self._members, name, Event.END, epoch)
            self._changed.notify_all()

    def rest(self, name: str, detail: str, seconds: float) -> None:
        """Leave a device out for so long."""
        with self._changed:
            until = self._clock() + seconds
            self._members = membership.rest(self._members, name, until, clip(detail))

    def fail(self, name: str, detail: str) -> None:
        """Leave a device out that has failed; see membership.fail."""
        with self._changed:
            self._members = membership.fail(self._members, name, self._clock(), clip(detail), self._limits)

    def met(self, names: Sequence[str]) -> None:
        """These devices work."""
        with self._changed:
            self._members = membership.met(self._members, names)

    def usable(self, *, resting: bool = False) -> tuple[Member, ...]:
        """Who can be given a shard; with `resting`, also who would better be left out."""
        return membership.usable(self.members, *(() if resting else (self._clock(),)))

    def wait(self, condition: Callable[[Members], T], timeout_s: float) -> T:
        """What `condition` says of the members, as soon as it is true, or at the end of the time."""
        due_at = self._clock() + timeout_s
        with self._changed:
            while True:
                self._expire()
                found, left_s = condition(self._members), due_at - self._clock()
                if found or left_s <= 0 or self._closed:
                    return found
                self._changed.wait(min(left_s, _POLL_S))

    def close(self, detail: str) -> None:
        """Dismiss all; who waits goes on."""
        with self._changed:
            self._closed = True
            for seat in self._seats.values():
                seat.end("CLOSED", detail)
            self._changed.notify_all()

    def _broken(self, name: str, broken: pb.Broken) -> None:
        """A device that fails for a reason of its own rests."""
        before = self._members[name]
        self._members = membership.happen(self._members, name, Event.BROKEN, broken.epoch)
        if self._members[name].phase != before.phase and broken.rank < 0 and broken.detail:
            self._members = membership.fail(self._members, name, self._clock(), clip(broken.detail), self._limits)

    def _expire(self) -> None:
        for name in membership.silent(self._members, self._clock(), self._limits.silence_s):
            self._members = membership.leave(self._members, name)
            self._seats.pop(name).end("SILENT", "The device said nothing for too long; it may join again.")
