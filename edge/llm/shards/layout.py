"""What lies where in a shard's file: every layer's attention and feed-forward network of one rank, block after block.

A shard is a safetensors file whose tensors follow from a few facts (`About`), in an order and with paddings that make
each block one range of whole pages: one read fetches it. Owns names, shapes and offsets. Must never touch a file.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fedge.edge.llm.models.config import Config
from fedge.edge.llm.shards.about import About, Share
from fedge.edge.llm.shards.quant import BLOCK, HEADS, Kind, blocks

Part = Literal["attn", "ffn", "head"]
PAGE = 4096
LINE = 64  # tensors of a block begin at cache lines
EMBEDDING = "embedding"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class Sizes:
    """A matrix of a block, without its numbers."""

    name: str
    rows: int
    columns: int
    bias: bool
    kind: Kind


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor: its name within the block, its type and shape, and its offset in bytes from the block's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Its size without padding."""
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What is taken into memory as one: `bytes` from `offset` of the file, both multiples of 4096.

    `layer` is the model's, also where the shard starts at a later one; that of "head" is the number of layers.
    """

    index: int
    layer: int
    part: Part
    offset: int
    bytes: int

    @property
    def name(self) -> str:
        """What the names of its tensors begin with."""
        return "head" if self.part == "head" else f"layers.{self.layer}.{self.part}"


def vectors(about: About, part: Part) -> dict[str, int]:
    """Names and lengths of a block's vectors, all of float32."""
    config = about.config
    normed = {"q_norm": config.head_dim, "k_norm": config.head_dim} if part == "attn" and config.qk_norm else {}
    return {"norm": config.hidden, **normed}


def matrices(about: About, part: Part) -> tuple[Sizes, ...]:
    """The matrices of a block. Ranks' partial sums of "o" and "down" are added, so only rank 0 has their bias."""
    config, share, first, kind = about.config, about.shares[about.rank], about.rank == 0, about.kind
    if part == "head":
        return (Sizes("head", config.vocab, config.hidden, bias=False, kind=HEADS[kind]),)
    if part == "attn":
        width = (share.kv_heads[1] - share.kv_heads[0]) * config.head_dim
        qkv = Sizes("qkv", width * (config.group + 2), config.hidden, config.qkv_bias, kind)
        return qkv, Sizes("o", config.hidden, width * config.group, config.o_bias and first, kind)
    width = share.ffn[1] - share.ffn[0]
    gate_up = Sizes("gate_up", 2 * width, config.hidden, config.ffn_bias, kind)
    return gate_up, Sizes("down", config.hidden, width, config.ffn_bias and first, kind)


def places(about: About, part: Part) -> tuple[Place, ...]:
    """The tensors of a block in their order."""
    tensors: list[tuple[str, str, tuple[int, ...]]] = [(name, "F32", (n,)) for name, n in vectors(about, part).items()]
    for matrix in matrices(about, part):
        tensors += _stored(matrix)
    found, at = [], 0
    for name, dtype, shape in tensors:
        place = Place(name, dtype, shape, at)
        found.append(place)
        at = _whole(at + place.bytes, LINE)
    return tuple(found)


def block_specs(about: About, start: int = 0) -> tuple[BlockSpec, ...]:
    """The blocks in the order in which they are computed; the first lies at `start`."""
    size: dict[Part, int] = {part: _size(places(about, part)) for part in ("attn", "ffn", "head")}
    wanted: list[tuple[int, Part]] = []
    for layer in range(*about.layers):
        wanted += [(layer, "attn"), (layer, "ffn")]
    if about.head:
        wanted.append((about.config.layers, "head"))
    found = []
    for index, (layer, part) in enumerate(wanted):
        found.append(BlockSpec(index, layer, part, start, size[part]))
        start += size[part]
    return tuple(found)


def entries(about: About) -> dict[str, Place]:
    """All tensors of the file by their full names, paddings too, with offsets from the end of the header."""
    found, at = {}, 0
    for name, place in _tensors(about):
        if place.offset > at:
            found[f"padding.{at}"] = Place("", "U8", (place.offset - at,), at)
        found[name] = place
        at = place.offset + place.bytes
    return found


def bytes_of(config: Config, share: Share, kind: Kind, rank0: bool) -> int:
    """Bytes of all blocks of one rank, head included on rank 0: what it holds or streams for every token.

    For a part of the layers, give a config of so many layers. The embedding is not counted: its rows are read singly.
    """
    return sum(block_sizes(config, share, kind, rank0))


def block_sizes(config: Config, share: Share, kind: Kind, rank0: bool) -> list[int]:
    """Bytes of one rank's blocks in the order in which they are computed; see `bytes_of`."""
    about = About("", kind, 0 if rank0 else 1, (share, share), (0, config.layers), "", rank0, config)
    return [block.bytes for block in block_specs(about)]


def _tensors(about: About) -> Iterator[tuple[str, Place]]:
    at = 0
    inside: dict[Part, tuple[Place, ...]] = {part: places(about, part) for part in ("attn", "ffn", "head")}
    for block in block_specs(about):
        for place in inside[block.part]:
            yield f"{block.name}.{place.name}", Place(place.name, place.dtype, place.shape, block.offset + place.offset)
        at = block.offset + block.bytes
    # The embedding may be empty, but it is there: so the last block, too, is padded to its end.
    rows = about.config.vocab if about.embedding else 0
    yield EMBEDDING, Place(EMBEDDING, about.embedding or "F32", (rows, about.config.hidden), at)


def _stored(matrix: Sizes) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, types and shapes of what `quant.Matrix` holds."""
    rows, columns, name = matrix.rows, matrix.columns, matrix.name
    if matrix.kind == "float32":
        tensors: list[tuple[str, str, tuple[int, ...]]] = [(f"{name}.weight", "F32", (rows, columns))]
    elif matrix.kind == "int8":
        tensors = [(f"{name}.weight", "I8", (rows, columns)), (f"{name}.scale", "F32", (rows,))]
    else:
        number = blocks(columns)
        tensors = [(f"{name}.weight", "U8", (rows, number, BLOCK // 2)), (f"{name}.scale", "F32", (rows, number))]
    return [*tensors, (f"{name}.bias", "F32", (rows,))] if matrix.bias else tensors


def _size(inside: tuple[Place, ...]) -> int:
    return _whole(inside[-1].offset + inside[-1].bytes, PAGE)


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
