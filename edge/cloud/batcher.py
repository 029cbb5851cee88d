"""What the tail computes next: the queue of all devices' requests, and which of them form a batch.

Requests for the same piece with the same shapes share a batch, in the order in which they came. The first of a batch
waits at most `batch_wait_s` for others, and not at all while a batch is full. What is past its deadline is dropped.
State is explicit and time an argument. Must never decode, run or send anything, or look at a clock.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedge.core.errors import Overloaded
from fedge.core.limits import EdgeLimits

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """One request: what it is, its size, when it came and until when it is wanted.

    Requests of one `key` may be stacked; None is stacked with nobody.
    """

    work: T
    key: Hashable | None
    rows: int
    size_bytes: int
    came_at: float
    due_at: float


@dataclass(slots=True)
class Batcher(Generic[T]):
    """The queue. `held_bytes` are those of the requests in it."""

    limits: EdgeLimits
    queue: list[Waiting[T]] = field(default_factory=list)
    held_bytes: int = 0

    def add(self, one: Waiting[T]) -> None:
        """Let a request wait. Raises Overloaded where the queue has no room."""
        if len(self.queue) >= self.limits.max_queue or self.held_bytes + one.size_bytes > self.limits.max_queue_bytes:
            raise Overloaded(f"{len(self.queue)} requests of {self.held_bytes} bytes wait already; ask again later.")
        self.queue.append(one)
        self.held_bytes += one.size_bytes

    def expired(self, now: float) -> list[Waiting[T]]:
        """Take out what is past its deadline."""
        late = [one for one in self.queue if one.due_at <= now]
        if late:
            self._keep([one for one in self.queue if one.due_at > now])
        return late

    def ready(self, now: float) -> list[Waiting[T]]:
        """Take out the next batch; empty where nothing waits, or what waits may still gather company."""
        if not self.queue:
            return []
        batch, full = self._batch()
        if not full and now < batch[0].came_at + self.limits.batch_wait_s:
            return []
        taken = {id(one) for one in batch}
        self._keep([one for one in self.queue if id(one) not in taken])
        return batch

    def drop(self, unwanted: Callable[[T], bool]) -> None:
        """Take out what nobody wants any more."""
        self._keep([one for one in self.queue if not unwanted(one.work)])

    def wake_at(self) -> float:
        """When `ready` or `expired` may have something, if nothing else comes; infinite for an empty queue."""
        if not self.queue:
            return float("inf")
        return min(self.queue[0].came_at + self.limits.batch_wait_s, *(one.due_at for one in self.queue))

    def _batch(self) -> tuple[list[Waiting[T]], bool]:
        """The oldest request with those that fit in, in order, and whether there is room for no more."""
        first, others = self.queue[0], self.queue[1:]
        batch, rows, size = [first], first.rows, first.size_bytes
        if first.key is None:
            return batch, True
        for one in others:
            if one.key != first.key:
                continue
            rows, size = rows + one.rows, size + one.size_bytes
            if rows > self.limits.max_batch or size > self.limits.max_tensor_bytes:
                return batch, True
            batch.append(one)
        return batch, rows >= self.limits.max_batch

    def _keep(self, queue: list[Waiting[T]]) -> None:
        self.queue = queue
        self.held_bytes = sum(one.size_bytes for one in queue)
