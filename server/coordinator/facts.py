"""Facts: events before they have a time, as the journal stores them.

Owns the form of a row's payload (MessagePack, typed by the row's kind) and how the bytes of an update on disk become
the arrays of an event. Must never decide anything.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from fedge.core.errors import JournalError
from fedge.core.task import Update
from fedge.protos import fedge_pb2 as pb
from fedge.protos import wire
from fedge.server.coordinator.files import digest
from fedge.server.machine.events import Arrived, Evaluated, Event, Failed, Joined, Left, Ticked


@dataclass(frozen=True, slots=True)
class Stored:
    """An update whose bytes lie whole, verified and synced in `file` of the journal's folder of updates.

    `begin` is the head of its upload as it came (an UploadBegin); `sha256` (hex) is over the whole file.
    """

    begin: bytes
    file: str
    sha256: str

    def update(self, folder: Path) -> Update:
        """The update, its blobs as read-only views of the file. Raises JournalError, or WrongManifest for bad bools."""
        begin = pb.UploadBegin.FromString(self.begin)
        path = folder / self.file
        try:
            whole = np.memmap(path, np.uint8, mode="r") if begin.manifest.size_bytes else np.empty(0, np.uint8)
        except (OSError, ValueError) as error:
            raise JournalError(f"The update {path} cannot be read ({error}); restore it from a copy.") from error
        return wire.update_from(begin, wire.decode_blobs(begin.manifest, whole.data))

    def verify(self, folder: Path) -> None:
        """Raises JournalError where the file is gone or has rotted."""
        path = folder / self.file
        try:
            found = digest(path)
        except OSError as error:
            raise JournalError(f"The update {path} cannot be read ({error}); restore it from a copy.") from error
        if found != self.sha256:
            raise JournalError(f"The update {path} has changed since it was journaled; restore it from a copy.")


Fact = Joined | Failed | Left | Ticked | Evaluated | Stored
_KINDS: dict[str, type[Fact]] = {kind.__name__: kind for kind in (Joined, Failed, Left, Ticked, Evaluated, Stored)}


def pack(fact: Fact) -> tuple[str, bytes]:
    """(kind, payload) of a row."""
    return type(fact).__name__, msgspec.msgpack.encode(fact)


def unpack(kind: str, payload: bytes) -> Fact:
    """The fact of a row. Raises JournalError where it is none."""
    try:
        return msgspec.msgpack.decode(payload, type=_KINDS[kind])
    except (KeyError, msgspec.MsgspecError) as error:
        raise JournalError(
            f"The journal holds a {kind!r} that cannot be read ({error}); use the fedge that wrote it."
        ) from error


def at(now: float, fact: Fact, folder: Path) -> Event:
    """The event that `fact` is at `now`; updates are read from `folder`."""
    if isinstance(fact, Stored):
        return Arrived(now, fact.update(folder))
    event: Callable[..., Event] = replace
    return event(fact, now=now)
