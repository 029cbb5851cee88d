"""Sums over all ranks: one hop through all pairs, a star, recursive doubling, and an exchange in 8 bits.

Float addition depends on its order, so each algorithm fixes one expression that every rank computes (or receives), and
all ranks hold the same bits afterwards. With p0, p1, ... the partial sums of ranks 0, 1, ...:

* `full`, `star` and `int8`: ((p0 + p1) + p2) + p3 and so on;
* `doubling`: neighbours first: (p0 + p1) + (p2 + p3). Of 2^k + e ranks, the first e pairs are added beforehand:
  five ranks make ((p0 + p1) + p2) + (p3 + p4). Up to three ranks this is the same expression as that of `full`.

Owns the algorithms, their cost model and the 8-bit coding. Must never measure (see `links`) or open a connection.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.edge.llm.mesh.frames import FLOAT32, INT8, PART, Link, swap

BLOCK = 32  # values that share a scale in the 8-bit exchange
_LEAST = 1e-30  # a block that never exceeds it is sent as zeros, because the inverse of its scale would overflow
_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Group:
    """All links of one rank, by the other end's rank, in rank order."""

    rank: int
    size: int
    links: Mapping[int, Link]

    @property
    def others(self) -> list[Link]:
        """The links in rank order."""
        return list(self.links.values())


Collective = Callable[[Group, Array], Array]


def full(group: Group, x: Array) -> Array:
    """Each sends its partial sum to all others: one hop, (N-1)·n bytes out of every rank.

    `x` is C-contiguous float32 and not empty; it is overwritten with the sum and returned. All here raise RankLost.
    """
    due = (PART, FLOAT32, x.nbytes)
    others = group.others
    swap(others, others, x.data.cast("B"), due)
    return _sum(group, x)


def star(group: Group, x: Array) -> Array:
    """Rank 0 adds and sends the sum back: two hops, and (N-1)·n bytes into and out of rank 0. See `full`."""
    due, flat = (PART, FLOAT32, x.nbytes), x.data.cast("B")
    if group.rank:
        head = [group.links[0]]
        swap(head, head, flat, due)
        x[...] = _floats(head[0], x)
        return x
    swap([], group.others, _NOTHING, due)
    _sum(group, x)
    swap(group.others, [], flat, due)
    return x


def doubling(group: Group, x: Array) -> Array:
    """Recursive doubling: log2(N) hops of n bytes each, and two more for ranks beyond a power of two. See `full`.

    Rabenseifner and Träff (EuroPVM/MPI 2004) describe it and the pairs that are folded first.
    """
    due, flat = (PART, FLOAT32, x.nbytes), x.data.cast("B")
    power = 1 << (group.size.bit_length() - 1)
    extra = group.size - power
    rank = group.rank
    if rank < 2 * extra and rank % 2:  # the second of a folded pair lets the first one work for it
        first = [group.links[rank - 1]]
        swap(first, first, flat, due)
        x[...] = _floats(first[0], x)
        return x
    if rank < 2 * extra:
        second = [group.links[rank + 1]]
        swap([], second, _NOTHING, due)
        x += _floats(second[0], x)
    place = rank // 2 if rank < 2 * extra else rank - extra
    hop = 1
    while hop < power:
        peer = [group.links[_rank_at(place ^ hop, extra)]]
        swap(peer, peer, flat, due)
        x += _floats(peer[0], x)  # a + b and b + a have the same bits
        hop *= 2
    if rank < 2 * extra:
        swap(second, [], flat, due)
    return x


def int8(group: Group, x: Array) -> Array:
    """`full` with every partial sum rounded to 8 bits, the own one too, so that all ranks add the same. See `full`.

    9/32 of the bytes. The sum is off by 0.54 % of its length (relative error of the Euclidean norm, whatever the number
    of ranks) for normally distributed values, and by 0.85 % for Student's t with 3 degrees of freedom.
    """
    coded = encode(x)
    others = group.others
    swap(others, others, coded.data, (PART, INT8, coded.nbytes))
    flat = x.reshape(-1)
    for rank in range(group.size):
        part = decode(coded if rank == group.rank else group.links[rank].payload(), x.size)
        if rank:
            flat += part
        else:
            flat[:] = part
    return x


INT8_SUMS = "int8"
COLLECTIVES: Mapping[str, Collective] = {"full": full, "star": star, "doubling": doubling, INT8_SUMS: int8}


def named(name: str) -> str:
    """The name of a collective. Raises ExperimentError where there is none of this name."""
    if name not in COLLECTIVES:
        raise ExperimentError(f"There is no collective {name!r}; choose one of {', '.join(COLLECTIVES)}.")
    return name


def seconds(size: int, round_trip_s: float, bandwidth_bps: float, bytes_: int) -> dict[str, float]:
    """How long each exact collective takes for `size` ranks and partial sums of `bytes_`, by its name; 0 for one rank.

    A hop costs half a round trip; bytes cost time where the most of them pass one rank's link, which is rank 0 for the
    star. On one radio channel all of them share the air, which the model does not know: name "star" there if it is
    faster. Raises ExperimentError for figures that are no measurement.
    """
    if not (size >= 1 and round_trip_s >= 0 and bandwidth_bps > 0 and bytes_ >= 0):
        raise ExperimentError(
            f"{size} ranks, {round_trip_s} s and {bandwidth_bps} bit/s are no measured link; measure it again."
        )
    if size == 1:
        return dict.fromkeys(("full", "doubling", "star"), 0.0)
    hop_s, part_s = round_trip_s / 2, bytes_ * 8 / bandwidth_bps
    power = 1 << (size.bit_length() - 1)
    hops = power.bit_length() - 1 + (2 if size > power else 0)
    return {
        "full": hop_s + (size - 1) * part_s,
        "doubling": hops * (hop_s + part_s),
        "star": 2 * (hop_s + (size - 1) * part_s),
    }


def choose(size: int, round_trip_s: float, bandwidth_bps: float, bytes_: int) -> str:
    """The fastest exact collective by `seconds`."""
    each = seconds(size, round_trip_s, bandwidth_bps, bytes_)
    return min(each, key=lambda name: each[name])


def encode(x: Array) -> Array:
    """Blocks of 32 values as 8 bits and a float32 scale: bytes, first all scales, then all values (padded by zeros).

    A block with an infinite value or NaN comes back without any finite one.
    """
    blocks = -(-x.size // BLOCK)
    flat = x.reshape(-1)
    if flat.size != blocks * BLOCK:
        flat = np.concatenate([flat, np.zeros(blocks * BLOCK - flat.size, np.float32)])
    rows = flat.reshape(blocks, BLOCK)
    coded = np.empty(blocks * (4 + BLOCK), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        most = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, BLOCK))  # four times as fast as max(axis=1)
        coded[: 4 * blocks].view(np.float32)[:] = most / np.float32(127)
        inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=~(most < _LEAST))
        scaled = rows * inverse[:, None]
        np.rint(scaled, out=scaled)
        coded[4 * blocks :].view(np.int8).reshape(blocks, BLOCK)[:] = scaled
    return coded


def decode(coded: Array, count: int) -> Array:
    """The `count` values that `encode` rounded, float32 [count]."""
    blocks = -(-count // BLOCK)
    scales = coded[: 4 * blocks].view(np.float32)
    with np.errstate(invalid="ignore"):
        values: Array = coded[4 * blocks :].view(np.int8).reshape(blocks, BLOCK) * scales[:, None]
    return values.reshape(-1)[:count]


def _sum(group: Group, x: Array) -> Array:
    """Add all partial sums in rank order, this rank's being `x`, into `x`."""
    parts: Sequence[Array] = [x if rank == group.rank else _floats(group.links[rank], x) for rank in range(group.size)]
    total, last = parts[0], group.size - 1
    for rank in range(1, group.size):
        # Rank 0's buffer holds what has been added so far, except that the last sum goes where it is wanted.
        total = np.add(total, parts[rank], out=x if rank == last else parts[0])
    return x


def _floats(link: Link, like: Array) -> Array:
    return link.payload().view(np.float32).reshape(like.shape)


def _rank_at(place: int, extra: int) -> int:
    """Which rank works at a place of the doubling, when the first `extra` pairs are folded."""
    return 2 * place if place < extra else place + extra
