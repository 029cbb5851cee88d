"""Files that survive a power cut: written beside, synced, renamed, the folder synced.

Must never leave a file under its final name that is not whole.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def sync(handle: int) -> None:
    """Make the bytes of an open file durable."""
    os.fsync(handle)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(handle)
    finally:
        os.close(handle)


def write(path: Path, parts: Iterable[bytes | memoryview], *, durable: bool) -> None:
    """`parts` under `path`, whole or not at all; `durable` against a power cut, not only a crash. Raises OSError."""
    beside = path.with_suffix(".tmp")
    with beside.open("wb") as file:
        file.writelines(parts)
        file.flush()
        if durable:
            sync(file.fileno())
    beside.rename(path)
    if durable:
        sync_folder(path.parent)


def let_go(path: Path) -> None:
    """A synced file will not be read again soon: its pages are worth more to the next write. Raises OSError."""
    if hasattr(os, "posix_fadvise"):  # macOS has none
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def digest(path: Path) -> str:
    """SHA-256 of a file, hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
