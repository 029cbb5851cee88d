"""Arrays out of .npz files, which may come from anywhere: sizes are checked before memory is asked for.

Owns the limit on a data set's size. Must never unpickle: object arrays are refused.
"""

import tokenize
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from fedge.core.errors import DataError
from fedge.core.limits import MAX_DATASET_ARRAYS, MAX_DATASET_BYTES
from fedge.core.params import Array

_ZIP_FAULTS = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_HEADER_FAULTS = (
    SyntaxError,
    TypeError,
    tokenize.TokenError,
    MemoryError,
)  # NumPy reads headers with Python's own parser
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays by name. Raises DataError where the file is missing, damaged, too large or holds objects."""
    if not path.is_file():
        raise DataError("there is no such file; check the path (it is relative to where fedge was started).")
    try:
        _check(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (*_ZIP_FAULTS, *_HEADER_FAULTS) as error:
        raise DataError(f"it cannot be read as .npz ({error}); write it with numpy.savez_compressed.") from error


def check_size(size: int) -> None:
    """Raises DataError where arrays of `size` bytes in total are beyond the limit."""
    if size > MAX_DATASET_BYTES:
        raise DataError(f"its arrays take {size} bytes, more than the limit of {MAX_DATASET_BYTES}; take a part of it.")


def _check(path: Path) -> None:
    """What the archive's directory and each header claim, before anything is unpacked."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_DATASET_ARRAYS:
            raise DataError(f"it holds {len(members)} arrays, more than the limit of {MAX_DATASET_ARRAYS}.")
        check_size(sum(member.file_size for member in members))
        for member in members:
            with archive.open(member) as stream:
                _check_header(member, stream)


def _check_header(member: zipfile.ZipInfo, stream: IO[bytes]) -> None:
    """An array must be exactly as long as its header says: memory is allotted by the header."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise DataError(f"array {member.filename!r} has an unknown format {version}; save it with numpy.savez.")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject:
        raise DataError(f"array {member.filename!r} holds Python objects, which are never loaded; store plain numbers.")
    if not dtype.itemsize or stream.tell() + prod(shape) * dtype.itemsize != member.file_size:
        raise DataError(f"array {member.filename!r} is not as long as its header says; save the file again.")
