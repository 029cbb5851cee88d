"""Cuts a model's folder into shards, one file per rank, quantised on the way.

A few megabytes of weights are in memory at a time, so a device can cut a model that is larger than its memory. A file
appears under its name when it is complete and on disk. Owns which rows and columns of which tensor go where. Must never
read a shard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import msgspec
import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.edge.files import replacing
from fedge.edge.llm.models.folder import EMBEDDING, HEAD, NORM, Folder
from fedge.edge.llm.shards import layout
from fedge.edge.llm.shards.about import About, Share, Stored, fault
from fedge.edge.llm.shards.layout import BlockSpec, Place, Sizes
from fedge.edge.llm.shards.quant import Kind, quantise, require_finite

Progress = Callable[[int, int], None]
METADATA = "fedge"
_SLAB_BYTES = 8 << 20  # of float32 weights in memory at a time


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a matrix come from a range of one tensor's rows, of which a range of columns is taken."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]


def export(
    folder: Folder,
    out: Path,
    shares: Sequence[Share],
    kind: Kind,
    *,
    layers: tuple[int, int] | None = None,
    with_head: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `rank-0-of-2.int8.safetensors` and so on into `out`, replacing files of these names; returns them by rank.

    `layers` (half-open) cuts out a part of the model, whose files are named for it; `with_head` gives rank 0 of a part
    without the last layer the final norm and the head as well, for exits that share them. `progress` is told bytes
    done and bytes in all. Raises ExperimentError for shares that do not fit, ModelError where a file cannot be written
    or weights are not finite.
    """
    abouts = [_about(folder, tuple(shares), kind, rank, layers, with_head) for rank in range(len(shares))]
    wrong = next(filter(None, map(fault, abouts)), None) if abouts else "there are none"
    if wrong:
        raise ExperimentError(f"The model cannot be shared in this way: {wrong}; let fedge plan the shares.")
    sizes = [_header(about)[1] for about in abouts]
    paths = [out / _name(about) for about in abouts]
    for rank, (path, about) in enumerate(zip(paths, abouts)):
        with replacing(path) as file:
            _Writer(folder, about, sum(sizes[:rank]), sum(sizes), progress).write(file)
    return paths


class _Writer:
    """Writes one file. Tensors are put where they belong; the gaps between them stay zero."""

    def __init__(self, folder: Folder, about: About, done: int, total: int, progress: Progress | None) -> None:
        self._folder, self._about = folder, about
        self._done, self._total, self._progress = done, total, progress

    def write(self, file: BinaryIO) -> None:
        """The whole file."""
        header, size = _header(self._about)
        file.truncate(size)
        file.write(header)
        self._advance(len(header))
        for block in layout.block_specs(self._about, len(header)):
            self._block(file, block)
        if self._about.embedding:
            self._embedding(file, size)

    def _block(self, file: BinaryIO, block: BlockSpec) -> None:
        inside = {place.name: place for place in layout.places(self._about, block.part)}
        names = _vector_names(block)
        for name in layout.vectors(self._about, block.part):
            _put(file, block, inside[name], require_finite(self._folder.tensor(names[name])))
        for sizes in layout.matrices(self._about, block.part):
            self._matrix(file, block, inside, sizes)
        self._advance(block.bytes)

    def _matrix(self, file: BinaryIO, block: BlockSpec, inside: dict[str, Place], sizes: Sizes) -> None:
        row = 0
        for piece in _pieces(self._about, block, sizes.name):
            if sizes.bias:
                bias = self._folder.rows(piece.name.removesuffix("weight") + "bias", *piece.rows)
                _put(file, block, inside[f"{sizes.name}.bias"], require_finite(bias), row)
            for slab in _slabs(self._folder, piece):
                rounded = quantise(slab, sizes.kind)
                _put(file, block, inside[f"{sizes.name}.weight"], rounded.data, row)
                if f"{sizes.name}.scale" in inside:
                    _put(file, block, inside[f"{sizes.name}.scale"], rounded.scale, row)
                row += len(slab)

    def _embedding(self, file: BinaryIO, end: int) -> None:
        config, stored = self._about.config, self._about.embedding
        size = config.vocab * config.hidden * layout.BYTES[stored]
        file.seek(end - size)
        for slab in _slabs(self._folder, _Piece(EMBEDDING, (0, config.vocab), (0, config.hidden))):
            file.write(_narrow(require_finite(slab), stored).data)
        self._advance(size)

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress:
            self._progress(self._done, self._total)


def _about(
    folder: Folder, shares: tuple[Share, ...], kind: Kind, rank: int, layers: tuple[int, int] | None, with_head: bool
) -> About:
    config = folder.config
    layers = layers or (0, config.layers)
    embedding = cast("Stored", folder.dtype(EMBEDDING)) if rank == 0 and layers[0] == 0 else ""
    head = rank == 0 and (with_head or layers[1] == config.layers)
    return About(folder.digest, kind, rank, shares, layers, embedding, head, config)


def _name(about: About) -> str:
    whole = about.layers == (0, about.config.layers)
    part = "" if whole else f".layers-{about.layers[0]}-{about.layers[1]}"
    return f"rank-{about.rank}-of-{len(about.shares)}{part}.{about.kind}.safetensors"


def _header(about: About) -> tuple[bytes, int]:
    """The file's beginning, whole pages, and the size of the whole file."""
    header: dict[str, object] = {"__metadata__": {METADATA: msgspec.json.encode(about).decode()}}
    end = 0
    for name, place in layout.entries(about).items():
        end = place.offset + place.bytes
        header[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": (place.offset, end)}
    text = msgspec.json.encode(header)
    text += b" " * (-(8 + len(text)) % layout.PAGE)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def _vector_names(block: BlockSpec) -> dict[str, str]:
    """Where a block's vectors come from."""
    if block.part == "head":
        return {"norm": NORM}
    prefix = f"model.layers.{block.layer}"
    norm = "input_layernorm" if block.part == "attn" else "post_attention_layernorm"
    attention = {name: f"{prefix}.self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
    return {"norm": f"{prefix}.{norm}.weight", **attention}


def _pieces(about: About, block: BlockSpec, name: str) -> list[_Piece]:
    """Where a matrix comes from, piece below piece."""
    config, share = about.config, about.shares[about.rank]
    prefix, whole = f"model.layers.{block.layer}", (0, config.hidden)
    if name == "head":
        return [_Piece(EMBEDDING if config.tied else HEAD, (0, config.vocab), whole)]
    keys = _times(share.kv_heads, config.head_dim)
    queries = _times(keys, config.group)
    if name == "qkv":
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        return [_Piece(f"{prefix}.self_attn.{part}.weight", rows[part], whole) for part in rows]
    if name == "gate_up":
        return [_Piece(f"{prefix}.mlp.{part}.weight", share.ffn, whole) for part in ("gate_proj", "up_proj")]
    if name == "o":
        return [_Piece(f"{prefix}.self_attn.o_proj.weight", whole, queries)]
    return [_Piece(f"{prefix}.mlp.down_proj.weight", whole, share.ffn)]


def _times(span: tuple[int, int], factor: int) -> tuple[int, int]:
    return span[0] * factor, span[1] * factor


def _slabs(folder: Folder, piece: _Piece) -> Iterator[Array]:
    """The piece as float32, some rows at a time; none where it is empty."""
    (start, stop), (left, right) = piece.rows, piece.columns
    if left == right:
        return
    config = folder.config
    step = max(1, _SLAB_BYTES // 4 // max(config.hidden, config.ffn, config.heads * config.head_dim))
    for row in range(start, stop, step):
        yield folder.rows(piece.name, row, min(row + step, stop))[:, left:right]


def _narrow(rows: Array, stored: Stored) -> Array:
    """float32 as the embedding is stored; exact, since the numbers come from that type."""
    if stored == "BF16":
        return (rows.view(np.uint32) >> 16).astype("<u2")
    return rows.astype("<f2" if stored == "F16" else "<f4")


def _put(file: BinaryIO, block: BlockSpec, place: Place, rows: Array, first: int = 0) -> None:
    """Write rows of a tensor, from row `first` of it on."""
    if rows.size:
        file.seek(block.offset + place.offset + first * (rows.nbytes // len(rows)))
        file.write(np.ascontiguousarray(rows).data)
