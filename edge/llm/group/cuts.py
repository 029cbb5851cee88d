"""The shards that the head has cut: one folder per model, kind and division, cut once and kept for the next time.

Several heads may use one folder: one of them cuts at a time, and none removes what another serves.
Owns the head's folder of shards and its size. Must never decide on a division.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fedge.core.errors import ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.files import replacing
from fedge.edge.llm.models.folder import Folder
from fedge.edge.llm.shards.about import FORMAT
from fedge.edge.llm.shards.layout import bytes_of
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import digest, export
from fedge.edge.llm.shards.shares import Share

INDEX = "cut.json"
_CUTTING, _SERVED = "cutting.lock", "served.lock"


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's shard as a file."""

    path: Path
    digest: str
    bytes: int


class _Entry(msgspec.Struct, frozen=True):
    file: str
    digest: str
    bytes: int


class Cuts:
    """Below `root`. `find` gives the files that were cut here or found, by digest."""

    def __init__(self, folder: Folder, kind: Kind, root: Path, limits: LlmLimits) -> None:
        self._folder, self._kind, self._root, self._limits = folder, kind, root, limits
        self._known: dict[str, Path] = {}
        self._served = contextlib.ExitStack()  # the lock of the division that is in use

    def find(self, digest: str) -> Path | None:
        """The file of this digest, or None."""
        return self._known.get(digest)

    def make(self, shares: Sequence[Share], watch: Callable[[], None] = lambda: None) -> list[Cut]:
        """The shards of all ranks, cut if they are not there yet. Raises ModelError where there is no room.

        They stay until the next ones are made, or until `close`. `watch` is asked between blocks, and may raise.
        """
        fact = msgspec.json.encode([FORMAT, self._folder.digest, self._kind, *shares])
        home = self._root / f"cut-{hashlib.sha256(fact).hexdigest()[:32]}"
        with _locked(self._root / _CUTTING, fcntl.LOCK_EX):
            self._served.close()  # who removes anything waits for the other lock
            cuts = self._made(home, shares, watch)
            self._served.enter_context(_locked(home / _SERVED, fcntl.LOCK_SH))
        self._known = {one.digest: one.path for one in cuts} | self._known
        return cuts

    def close(self) -> None:
        """Other heads may remove what was served."""
        self._served.close()

    def _made(self, home: Path, shares: Sequence[Share], watch: Callable[[], None]) -> list[Cut]:
        cuts = _read(home)
        if not all(self._whole(one) for one in cuts):
            cuts = []
        if len(cuts) != len(shares):
            need = sum(bytes_of(self._folder.config, share, self._kind, rank == 0) for rank, share in enumerate(shares))
            self._prune(home, need)
            paths = export(self._folder, home, shares, self._kind, progress=lambda *_: watch())
            cuts = [Cut(path, digest(path), path.stat().st_size) for path in paths]
            _write(home, cuts)
        _touch(home)
        return cuts

    def _whole(self, cut: Cut) -> bool:
        """Its bytes are compared once in a process."""
        return cut.digest in self._known or digest(cut.path) == cut.digest

    def _prune(self, home: Path, need: int) -> None:
        """Remove the divisions that were used longest ago and are not in use, until `need` bytes have room."""
        others = [one for one in self._root.glob("cut-*") if one.is_dir() and one != home]
        sizes = {one: sum(file.stat().st_size for file in one.iterdir()) for one in others}
        room = self._limits.max_store_bytes - need - sum(sizes.values())
        for one in sorted(others, key=lambda one: one.stat().st_mtime):
            if room >= 0:
                break
            if not _removed(one):
                continue
            self._known = {key: path for key, path in self._known.items() if path.parent != one}
            room += sizes[one]


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """A file's lock, once others let go of it. Raises ModelError where there can be none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ModelError(f"{path.parent} cannot be used ({error}); name another folder for shards.") from error
    with file:
        try:
            fcntl.flock(file, how)
        except OSError as error:
            raise ModelError(f"{path} cannot be locked ({error}); name another folder for shards.") from error
        yield


def _removed(home: Path) -> bool:
    """Whether nobody served it, and it is gone now."""
    try:
        with _locked(home / _SERVED, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(home, ignore_errors=True)
    except ModelError:
        return False
    return True


def _read(home: Path) -> list[Cut]:
    """What was cut before and is still whole; nothing where a file is missing or of another size."""
    try:
        entries = msgspec.json.decode((home / INDEX).read_bytes(), type=list[_Entry])
        cuts = [Cut(home / Path(one.file).name, one.digest, one.bytes) for one in entries]
        return cuts if all(one.path.stat().st_size == one.bytes for one in cuts) else []
    except (OSError, msgspec.MsgspecError, ValueError):
        return []


def _write(home: Path, cuts: Sequence[Cut]) -> None:
    with replacing(home / INDEX) as file:
        file.write(msgspec.json.encode([_Entry(one.path.name, one.digest, one.bytes) for one in cuts]))


def _touch(home: Path) -> None:
    try:
        os.utime(home)
    except OSError as error:
        raise ModelError(f"{home} cannot be used ({error}); name another folder for shards.") from error
