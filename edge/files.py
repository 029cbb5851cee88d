"""Files that are there whole or not at all: written beside, brought to disk, and only then given their name.

Owns the file beside. Must never leave it there where writing has failed, nor anything under the final name but a whole
file.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedge.core.errors import ModelError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An empty file to be filled; it takes the place of `path` at the end, unless an exception ends the context.

    Missing folders are made. A kill leaves what was there before, and perhaps a `.part` beside it that nothing reads.
    Raises ModelError for a disk that is full, a folder that cannot be written and any other OSError of the context.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")  # another process may write the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with beside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise ModelError(f"{path} cannot be written ({error}); free some space or name another folder.") from error


def _sync(folder: Path) -> None:
    """The names in a folder, to disk; Windows opens no folders, and needs no telling."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
