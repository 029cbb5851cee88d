"""The shards of a worker on its disk, whole ones and half-fetched ones.

A file has its name when its SHA-256 has been compared; what was fetched so far lies beside it and outlives a restart.
Owns the worker's folder, which one process uses at a time. Must never call anybody.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from fedge.core.errors import DataError, ExperimentError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.shards import shard

_ENDING, _PART = ".safetensors", ".part"


class Store:
    """A folder. Raises ExperimentError where another process uses it or it cannot be made."""

    def __init__(self, root: Path, limits: LlmLimits) -> None:
        self.root, self._limits = root, limits
        self._verified: dict[str, tuple[int, int]] = {}
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = (root / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ExperimentError(f"Another worker uses {root}; give each a name of its own (--name).") from error
        except OSError as error:
            raise ExperimentError(f"The folder {root} cannot be used ({error}); name another for shards.") from error

    def close(self) -> None:
        """Another process may use it."""
        self._lock.close()

    def whole(self, digest: str) -> Path | None:
        """The shard's file if its bytes are right; a file whose bytes are not is removed. Raises ModelError."""
        path = self._path(digest)
        if not path.is_file():
            return None
        state = path.stat()
        mark = state.st_mtime_ns, state.st_size
        if self._verified.get(digest) != mark:
            if shard.digest(path) != digest:
                self.drop(digest)
                return None
            self._verified[digest] = mark
        return path

    def fetched(self, digest: str) -> int:
        """Bytes of it that are here already."""
        part = self._part(digest)
        return part.stat().st_size if part.is_file() else 0

    def fetch(self, digest: str, size: int, chunks: Iterable[bytes]) -> Path:
        """Go on with a half-fetched shard of `size` bytes in all; the file once it is whole and right.

        Raises DataError for bytes that are wrong, which are forgotten, and for too few, which are kept; ModelError for
        a full disk; and whatever `chunks` raises.
        """
        self._make_room(digest, size)
        part, path = self._part(digest), self._path(digest)
        try:
            with part.open("ab") as file:
                for chunk in chunks:
                    if file.tell() + len(chunk) > size:
                        break
                    file.write(chunk)
                got = file.tell()
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ModelError(f"{part} cannot be written ({error}); free some space or name another folder.") from error
        if got < size:
            raise DataError(f"Only {got} of {size} bytes of a shard came; the rest is fetched the next time.")
        if shard.digest(part) != digest:
            part.unlink()
            raise DataError("A shard came with other bytes than were promised; it is fetched again.")
        part.replace(path)
        self._verified[digest] = (path.stat().st_mtime_ns, path.stat().st_size)
        return path

    def drop(self, digest: str) -> None:
        """Forget a shard that cannot be used."""
        self._verified.pop(digest, None)
        self._path(digest).unlink(missing_ok=True)

    def _make_room(self, digest: str, size: int) -> None:
        """Remove the oldest of the others until all are within the limit."""
        if size > self._limits.max_store_bytes:
            raise ModelError(f"A shard has {size} bytes, and {self._limits.max_store_bytes} are allowed; allow more.")
        with contextlib.suppress(OSError):
            others = [path for path in self.root.iterdir() if path.suffix in (_ENDING, _PART)]
            others = sorted((one for one in others if one.stem != digest), key=lambda one: one.stat().st_mtime)
            excess = size + sum(one.stat().st_size for one in others) - self._limits.max_store_bytes
            for one in others:
                if excess <= 0:
                    break
                excess -= one.stat().st_size
                one.unlink()

    def _path(self, digest: str) -> Path:
        return self.root / f"{digest}{_ENDING}"

    def _part(self, digest: str) -> Path:
        return self.root / f"{digest}{_PART}"
