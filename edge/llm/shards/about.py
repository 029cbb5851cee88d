"""The facts from which the whole layout of a shard follows, and whether they can be true.

They lie as JSON in the metadata of the shard's file, which may come from a stranger. Owns their types and the
judgement. Must never touch a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from fedge.core.limits import LlmLimits
from fedge.edge.llm.models.config import FAMILIES, ROPE_KINDS, Config, computable
from fedge.edge.llm.shards.quant import KINDS, Kind

FORMAT = 2
FFN_GRANULE = 32  # columns; a multiple of the quantisation block of int4
MAX_SIZE = 1 << 24  # of one dimension
Stored = Literal["F32", "F16", "BF16", ""]  # how the embedding is stored, if at all


@dataclass(frozen=True, slots=True)
class Share:
    """Half-open ranges; either may be empty, so that there can be more ranks than key/value heads."""

    kv_heads: tuple[int, int]
    ffn: tuple[int, int]


@dataclass(frozen=True, slots=True)
class About:
    """One shard. `model` is the digest of the folder it was made from; `layers` is half-open.

    The embedding and the head (with the final norm) are rank 0's, where it has the first and the last layer; a part
    without the last layer may have the head all the same, for its exits.
    """

    model: str
    kind: Kind
    rank: int
    shares: tuple[Share, ...]
    layers: tuple[int, int]
    embedding: Stored
    head: bool
    config: Config
    format: int = FORMAT


def fault(about: About, limits: LlmLimits = LlmLimits()) -> str | None:
    """What cannot be true of these facts, or None."""
    return next(_faults(about, limits), None)


def _faults(about: About, limits: LlmLimits) -> Iterator[str]:
    config, ranks = about.config, len(about.shares)
    if about.format != FORMAT or about.kind not in KINDS:
        yield f"it has format {about.format} and kind {about.kind}, not {FORMAT} and one of {', '.join(KINDS)}"
    yield from _config_faults(config, limits)
    if not (0 <= about.rank < ranks <= limits.max_ranks):
        yield f"it is of rank {about.rank} of {ranks}, with at most {limits.max_ranks}"
    if not _covers([share.kv_heads for share in about.shares], config.kv_heads):
        yield f"the ranks' key/value heads do not follow each other from 0 to {config.kv_heads}"
    columns = [share.ffn for share in about.shares]
    if not _covers(columns, config.ffn) or any(cut % FFN_GRANULE for cut, _ in columns if cut != config.ffn):
        yield f"the ranks' columns do not follow each other from 0 to {config.ffn} in multiples of {FFN_GRANULE}"
    start, stop = about.layers
    if not 0 <= start < stop <= config.layers:
        yield f"it has layers {start} to {stop} of {config.layers}"
    if bool(about.embedding) != (about.rank == 0 and start == 0):
        yield "it has an embedding where none belongs, or none where one does"
    if about.head > (about.rank == 0) or about.head < (about.rank == 0 and stop == config.layers):
        yield "it has a head where none belongs, or none where one does"


def _config_faults(config: Config, limits: LlmLimits) -> Iterator[str]:
    sizes = (config.hidden, config.ffn, config.heads, config.kv_heads, config.head_dim, config.vocab, config.context)
    if not all(1 <= size <= MAX_SIZE for size in sizes) or not 1 <= config.layers <= limits.max_layers:
        yield f"its sizes are outside 1 to {MAX_SIZE}, or its layers above {limits.max_layers}"
    elif config.heads % config.kv_heads or config.head_dim % 2:
        yield "its key/value heads do not divide its heads, or its heads are of odd size"
    if config.family not in FAMILIES or not 0 < config.eps < 1 or not 0 <= config.window <= MAX_SIZE:
        yield "its family, eps or window is unknown"
    tokens = (*config.eos, *(() if config.bos is None else (config.bos,)))
    if not all(0 <= token < config.vocab for token in tokens):
        yield "its first or last token is outside the vocabulary"
    rope = config.rope
    if rope.kind not in ROPE_KINDS:
        yield "its rotary positions are of an unknown kind"
    elif not computable(rope) or rope.original_context > MAX_SIZE:
        yield "its rotary positions cannot be computed"


def _covers(ranges: list[tuple[int, int]], end: int) -> bool:
    """They follow each other from 0 to `end`, in order, without a gap."""
    cuts = [(0, 0), *ranges, (end, end)]
    return all(start <= stop for start, stop in ranges) and all(a[1] == b[0] for a, b in pairwise(cuts))
