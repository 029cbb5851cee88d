"""Who is connected: one session per client, held by its latest incarnation.

Owns fencing (an older incarnation may do nothing more) and liveness (who has not been heard of). Must never decide
what a client works on.
"""

import asyncio
import time
from dataclasses import dataclass, field

from fedge.core.errors import FedgeError, NotJoined, StaleIncarnation
from fedge.core.task import Task
from fedge.protos import fedge_pb2 as pb


@dataclass(slots=True, eq=False)
class Session:
    """One incarnation of one client.

    `task` is what was dispatched to it last and `dispatched` counts those; `stream` marks the task stream in use;
    `told`: it knows that the run is over; `ended` is why this incarnation may do nothing more.
    """

    client: str
    incarnation: str
    task: Task | None = None
    dispatched: int = 0
    stream: object = None
    told: bool = False
    ended: FedgeError | None = None
    seen_s: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def touch(self) -> None:
        """Something came from the client."""
        self.seen_s = time.monotonic()

    def give(self, task: Task) -> None:
        """A new task for its stream."""
        self.task = task
        self.dispatched += 1
        self.changed.set()

    def end(self, why: FedgeError) -> None:
        """Fence it off."""
        self.ended = why
        self.changed.set()


class Sessions:
    """The sessions of all connected clients, by name."""

    def __init__(self) -> None:
        self._by_client: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._by_client)

    def find(self, client: str) -> Session | None:
        """The session of a client, where it is connected."""
        return self._by_client.get(client)

    def check(self, sender: pb.Sender) -> Session:
        """The session of who speaks. Raises NotJoined or StaleIncarnation."""
        session = self._by_client.get(sender.client)
        if session is None:
            raise NotJoined("This client has not joined, or was taken for gone; join again.")
        if session.incarnation != sender.incarnation:
            raise StaleIncarnation("Another process has joined under this client's name; stop one of them.")
        session.touch()
        return session

    def admit(self, client: str, incarnation: str) -> Session:
        """A new session; one of an older incarnation is fenced off."""
        self.drop(client, StaleIncarnation("Another process has joined under this client's name; stop one of them."))
        session = self._by_client[client] = Session(client, incarnation)
        return session

    def drop(self, client: str, why: FedgeError) -> None:
        """End a client's session, where it has one."""
        session = self._by_client.pop(client, None)
        if session:
            session.end(why)

    def wake(self) -> None:
        """Let every stream look again."""
        for session in self._by_client.values():
            session.changed.set()

    def told(self) -> bool:
        """Whether all of them know that the run is over."""
        return all(session.told for session in self._by_client.values())

    def silent(self, liveness_s: float) -> list[Session]:
        """Those without a task stream that have not been heard of for so long."""
        oldest = time.monotonic() - liveness_s
        return [session for session in self._by_client.values() if session.stream is None and session.seen_s < oldest]
