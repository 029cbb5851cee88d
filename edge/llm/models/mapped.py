"""One safetensors file, mapped: its header, judged, and float32 copies of what is asked for, and of nothing else.

Owns the format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header, then
the tensors without a gap. A header comes from a stranger: nothing of it is believed before it is checked against the
file. Must never read a whole file, nor hand out a view of the map: the file may be closed before the array.
"""

import contextlib
import math
import mmap
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from fedge.core.errors import ModelError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array

Dtype = np.dtype[Any]
MAX_RANK = 8  # dimensions; more would let the product of a short header grow without end
_KINDS: Final[dict[str, Dtype]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_Size = Annotated[int, msgspec.Meta(ge=0)]


class Entry(msgspec.Struct, frozen=True):
    """One tensor of the header. Offsets are bytes from the end of the header, the second exclusive."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_RANK)]
    data_offsets: tuple[_Size, _Size]


class Mapped:
    """A file and its tensors by name. Raises ModelError where the file is not what it says."""

    def __init__(self, path: Path, limits: LlmLimits = LlmLimits()) -> None:
        self.path = path
        self._map, self.header = _open(path, limits)
        self._base = 8 + len(self.header)
        try:
            self.entries = entries(self.header, len(self._map) - self._base)
        except ModelError as error:
            self._map.close()
            raise ModelError(f"{path}: {error}") from error

    def view(self, name: str) -> Array:
        """The stored numbers, read-only, on the map: float32, float16, or bfloat16 as uint16. Not to be kept."""
        entry = self.entries[name]
        if entry.dtype not in _KINDS:
            raise ModelError(
                f"{self.path}: {name} is stored as {entry.dtype}; save the model as float32, float16 or bfloat16."
            )
        flat = np.frombuffer(self._map, _KINDS[entry.dtype], math.prod(entry.shape), self._base + entry.data_offsets[0])
        return flat.reshape(entry.shape)

    def sample(self, name: str, size: int) -> bytes:
        """At most `size` bytes from the middle of a tensor, as they are stored."""
        begin, end = (self._base + offset for offset in self.entries[name].data_offsets)
        middle = (begin + end) // 2
        return self._map[middle : min(middle + size, end)]

    def forget(self, name: str) -> None:
        """Give back the memory that mapped pages of this tensor take; reading it again brings them back."""
        begin, end = (self._base + offset for offset in self.entries[name].data_offsets)
        begin -= begin % mmap.PAGESIZE
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Unmap the file; a view that is still alive keeps it mapped."""
        with contextlib.suppress(BufferError):
            self._map.close()


def widen(stored: Array) -> Array:
    """A new C-contiguous float32 array of what `view` gives, or of a part. bfloat16 is the upper half of float32."""
    if stored.dtype == np.dtype("<u2"):
        wide = np.ascontiguousarray(stored).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return np.array(stored, dtype=np.float32, order="C")


def entries(header: bytes, size: int) -> dict[str, Entry]:
    """The tensors that a header names, where they fill the `size` bytes after it, each once. Raises ModelError."""
    found: dict[str, Entry] = {}
    try:
        for name, raw in msgspec.json.decode(header, type=dict[str, msgspec.Raw]).items():
            if name != "__metadata__":
                found[name] = msgspec.json.decode(raw, type=Entry)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"the header is no safetensors header ({error!s:.200}); fetch the file again.") from error
    at = 0
    for name, entry in sorted(found.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != at or end < begin or end > size:
            raise ModelError(
                f"{name!r:.80} lies at bytes {begin} to {end}, beyond {size} or not right after the last; fetch again."
            )
        if entry.dtype in _KINDS and math.prod(entry.shape) * _KINDS[entry.dtype].itemsize != end - begin:
            raise ModelError(f"{name!r:.80} has {end - begin} bytes, which its shape does not; fetch the file again.")
        at = end
    if at != size:
        raise ModelError(f"its tensors take {at} bytes and the file has {size}; fetch it again.")
    return found


def _open(path: Path, limits: LlmLimits) -> tuple[mmap.mmap, bytes]:
    """The map and the bytes of the header."""
    try:
        if not path.is_file():  # a pipe would hang
            raise ModelError(f"{path} is missing or no file; fetch the model's folder again.")
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ModelError(f"{path} cannot be read ({error!s:.200}); fetch it again.") from error
    length = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or length > min(len(whole) - 8, limits.max_header_bytes):
        whole.close()
        raise ModelError(
            f"{path} has a header that is longer than the file or {limits.max_header_bytes} bytes; fetch it again."
        )
    return whole, whole[8 : 8 + length]
