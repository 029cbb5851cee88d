"""A user's end of one request: pieces come out, a cancellation goes in.

Owns the queue between the engine's thread and the user's. Its length is bounded by the request's number of tokens.
Must never touch the scheduler or the model.
"""

import logging
import queue
from collections.abc import Callable, Iterator

from fedge.edge.llm.engine.requests import Piece, Usage

log = logging.getLogger("fedge")


class Handle:
    """Iterate over it for the pieces; the last one has `finish`. `usage` can be read at any time.

    With `on_piece` the pieces go there instead, and iterating gives none. It is called on the engine's thread, which
    waits meanwhile: it only hands on (loop.call_soon_threadsafe). Where it raises, the request is cancelled.
    """

    def __init__(
        self, key: int, usage: Usage, cancel: Callable[[int], None], on_piece: Callable[[Piece], None] | None
    ) -> None:
        self.key = key
        self.usage = usage
        self._cancel = cancel
        self._on_piece = on_piece
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._delivered_last = False
        self._read_last = on_piece is not None

    def cancel(self) -> None:
        """End the request at the next step, from any thread and at any time; its last piece says "cancelled"."""
        self._cancel(self.key)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        if self._read_last:
            raise StopIteration
        piece = self._pieces.get()
        self._read_last = piece.finish is not None
        return piece

    def deliver(self, piece: Piece) -> None:
        """The engine's: one more piece. Nothing follows the last one."""
        if self._delivered_last:
            return
        self._delivered_last = piece.finish is not None
        if self._on_piece is None:
            self._pieces.put(piece)
            return
        try:
            self._on_piece(piece)
        except Exception:
            log.exception("The receiver of request %d's pieces raised; the request is cancelled", self.key)
            self.cancel()
