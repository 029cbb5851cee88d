"""The versions of the model that clients may still ask for.

The current one is the machine's own memory, described once and shared by all downloads; an older one that a leased
task needs goes to a file, so that memory does not grow with the fleet. Must never copy a model in memory.
"""

import mmap
from collections.abc import Container
from pathlib import Path

from fedge.core.task import Broadcast
from fedge.protos import fedge_pb2 as pb
from fedge.protos.wire import Encoded, encode_broadcast
from fedge.server.coordinator.files import write
from fedge.server.coordinator.journal import guarded

_HEAD = 8  # bytes before the manifest that hold its length


class Versions:
    """Published by the machine's thread, looked up by the event loop."""

    def __init__(self, folder: Path, broadcast: Broadcast) -> None:
        self._folder = folder
        with guarded(f"use the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            for torn in folder.glob("*.tmp"):
                torn.unlink()
        self.current = encode_broadcast(broadcast)

    def publish(self, broadcast: Broadcast, needed: Container[int]) -> None:
        """A new current version; of the older ones, keep those that are needed. Raises JournalError (disk full)."""
        old, self.current = self.current, encode_broadcast(broadcast)
        with guarded("keep an older version of the model"):
            if old.version in needed:
                manifest = old.manifest.SerializeToString()
                parts = [len(manifest).to_bytes(_HEAD, "big"), manifest, *old.buffers]
                write(self._folder / f"{old.version}.model", parts, durable=False)
            for path in self._folder.glob("*.model"):
                if int(path.stem) not in needed:
                    path.unlink()

    def find(self, version: int) -> Encoded | None:
        """A version that is still kept."""
        if version == self.current.version:
            return self.current
        try:
            with (self._folder / f"{version}.model").open("rb") as file:
                whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (FileNotFoundError, ValueError):
            return None
        start = _HEAD + int.from_bytes(whole[:_HEAD], "big")
        manifest = pb.Manifest.FromString(bytes(whole[_HEAD:start]))
        payload = whole[start:]
        return Encoded(version, manifest, [payload]) if len(payload) == manifest.size_bytes else None
