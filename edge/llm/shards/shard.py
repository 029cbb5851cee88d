"""One rank's part of a model, as a file that is mapped: which blocks it has, and their matrices as views of bytes.

A file comes from elsewhere: it is used only if every tensor of it is what its own facts demand. Owns the reading of
shards. Must never copy a block, nor read one before it is asked for.
"""

import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedge.core.errors import DataError, ModelError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.models import advice
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.models.mapped import Entry, entries, widen
from fedge.edge.llm.shards import layout
from fedge.edge.llm.shards.about import About, Share, fault
from fedge.edge.llm.shards.export import METADATA, export
from fedge.edge.llm.shards.layout import BlockSpec, Part, Place
from fedge.edge.llm.shards.quant import Kind, Matrix

__all__ = ["BlockSpec", "Shard", "digest", "export", "open_shard", "state_of"]

_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "|i1", "U8": "|u1"}
_AGAIN = "export the model again"


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """An open shard. `mapped` is the whole file, read-only; it stays mapped for as long as a view of it lives.

    `state` is what `state_of` said of the file when it was mapped: who opens it again must find the same.
    """

    path: Path
    about: About
    blocks: tuple[BlockSpec, ...]
    mapped: memoryview = field(repr=False)
    state: tuple[int, ...] = field(repr=False)
    _places: dict[Part, tuple[Place, ...]] = field(repr=False)
    _embedding: Array | None = field(repr=False)

    @property
    def config(self) -> Config:
        """The whole model's sizes."""
        return self.about.config

    @property
    def kind(self) -> Kind:
        """How its matrices are stored."""
        return self.about.kind

    @property
    def rank(self) -> int:
        """Whose it is."""
        return self.about.rank

    @property
    def ranks(self) -> int:
        """How many share the model."""
        return len(self.about.shares)

    @property
    def shares(self) -> tuple[Share, ...]:
        """What every rank holds."""
        return self.about.shares

    @property
    def share(self) -> Share:
        """What this rank holds."""
        return self.about.shares[self.about.rank]

    @property
    def model(self) -> str:
        """The digest of the folder it was made from."""
        return self.about.model

    @property
    def layers(self) -> range:
        """The layers it has; all, unless the model is split between a device and a cloud."""
        return range(*self.about.layers)

    def view(self, block: BlockSpec, buffer: memoryview | Array) -> dict[str, Matrix | Array]:
        """Views of a block's bytes at the start of `buffer` (bytes, or uint8 [>= block.bytes]); nothing is copied.

        attn: "norm", "qkv" (rows: query heads, then keys, then values), "o", and "q_norm" and "k_norm" in models that
        have them; ffn: "norm", "gate_up" (rows: gate, then up), "down"; head: "norm", "head". A rank without
        key/value heads or FFN columns has matrices with 0 rows or columns; the bias of such an "o" or "down" counts.
        """
        arrays = {place.name: _array(place, buffer) for place in self._places[block.part]}
        found: dict[str, Matrix | Array] = {name: arrays[name] for name in layout.vectors(self.about, block.part)}
        for size in layout.matrices(self.about, block.part):
            weight, bias = arrays[f"{size.name}.weight"], arrays.get(f"{size.name}.bias")
            scale = arrays.get(f"{size.name}.scale", np.empty(0, np.float32))
            found[size.name] = Matrix(size.kind, size.rows, size.columns, weight, scale, bias)
        return found

    def embed(self, ids: Sequence[int] | NDArray[np.integer]) -> Array:
        """Rows of the embedding, float32 [n, hidden]. Raises DataError for ids outside the vocabulary."""
        if self._embedding is None:
            raise ModelError(f"{self.path} has no embedding; ask rank 0 of the part that has the first layer.")
        rows = np.asarray(ids, np.int64)
        if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < len(self._embedding):
            raise DataError(f"A token is outside 0 to {len(self._embedding) - 1}; use the model's own tokenizer.")
        return widen(self._embedding[rows])


class _Head(msgspec.Struct, frozen=True):
    """The header's own entry; the tensors are judged apart."""

    metadata: dict[str, str] = msgspec.field(name="__metadata__")


def open_shard(path: Path, limits: LlmLimits = LlmLimits()) -> Shard:
    """Map and judge a shard. Raises ModelError where it is no whole shard that this version can use."""
    whole, state = _map(path)
    length = int.from_bytes(whole[:8], "little")
    start = 8 + length
    if length > limits.max_header_bytes or not 8 <= start <= len(whole) or start % layout.PAGE:
        raise ModelError(f"{path} is no shard: its header is too long or not whole pages; {_AGAIN}.")
    header = bytes(whole[8:start])
    try:
        about = msgspec.json.decode(msgspec.json.decode(header, type=_Head).metadata[METADATA], type=About)
        found = entries(header, len(whole) - start)
    except (msgspec.MsgspecError, KeyError, UnicodeError, RecursionError, ModelError) as error:
        raise ModelError(f"{path} has no header of a shard ({error!s:.200}); {_AGAIN}.") from error
    wrong = fault(about, limits) or _difference(about, found)
    if wrong:
        raise ModelError(f"{path} contradicts itself or this version: {wrong}; {_AGAIN}.")
    parts: tuple[Part, ...] = ("attn", "ffn", "head")
    places = {part: layout.places(about, part) for part in parts}
    last = layout.entries(about)[layout.EMBEDDING]
    embedding = _array(last, whole, start) if about.embedding else None
    if embedding is not None:
        advice.scattered(whole, start + last.offset, last.bytes)  # rows are gathered; blocks are still read ahead
    return Shard(path, about, layout.block_specs(about, start), whole, state, places, embedding)


def digest(path: Path) -> str:
    """SHA-256 of the file, hex. Raises ModelError where it cannot be read."""
    _plain(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}); {_AGAIN}.") from error


def state_of(handle: int) -> tuple[int, ...]:
    """Which file an open descriptor is, and whether it has been written to: equal as long as neither has changed."""
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _map(path: Path) -> tuple[memoryview, tuple[int, ...]]:
    """The file, mapped, and its state; closing is left to the last view of it."""
    _plain(path)
    try:
        with path.open("rb") as file:
            state = state_of(file.fileno())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), state
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise ModelError(f"{path} cannot be read ({error}); {_AGAIN}.") from error


def _plain(path: Path) -> None:
    if not path.is_file():  # a pipe would hang
        raise ModelError(f"{path} is missing or no file; {_AGAIN}.")


def _difference(about: About, found: Mapping[str, Entry]) -> str | None:
    """Where the tensors are not those that the facts demand, or None."""
    wanted = layout.entries(about)
    for name, place in wanted.items():
        entry = found.get(name)
        ends = place.offset, place.offset + place.bytes
        if entry is None or (entry.dtype, entry.shape, entry.data_offsets) != (place.dtype, place.shape, ends):
            return f"{name} is missing or not where it belongs"
    return None if len(found) == len(wanted) else "it has more tensors than belong to it"


def _array(place: Place, buffer: memoryview | Array, start: int = 0) -> Array:
    return np.ndarray(place.shape, _TYPES[place.dtype], buffer, start + place.offset)
