"""One pass through the model for tokens of several sequences at once, as rank 0 tells it to the others.

Owns the description and its bytes. Must never hold tokens: a worker sees embeddings only.

A **slot** holds one sequence's keys and values, contiguous, for up to the context's length. The tokens of a step are
flattened: parts follow each other in the rows of `x` [tokens, hidden], `count` rows each, which are positions `start`,
`start` + 1, ... of their slot. What a slot holds at and after `start` is overwritten, so going back needs no order.
Slots are freed first, then copied in order, then the parts are computed.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from fedge.core.errors import RankLost
from fedge.core.limits import LlmLimits

_HEADER = struct.Struct("<4sIII")  # magic, then how many parts, copies and freed slots follow
_TRIPLE = struct.Struct("<III")
_NUMBER = struct.Struct("<I")
_MAGIC = b"STP1"


@dataclass(frozen=True, slots=True)
class Part:
    """`count` tokens of the sequence in `slot`, from position `start` on."""

    slot: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Before the step: positions 0 to `count` of slot `source` are copied to `target` (a shared prefix)."""

    source: int
    target: int
    count: int


@dataclass(frozen=True, slots=True)
class Step:
    """`free` names slots whose memory is given back before the step. A slot has at most one part."""

    parts: tuple[Part, ...]
    copies: tuple[Copy, ...] = ()
    free: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Rows of `x`."""
        return sum(part.count for part in self.parts)


def encode(step: Step, limits: LlmLimits = LlmLimits()) -> bytes:
    """Header, parts, copies and freed slots as little-endian numbers of 32 bits. Raises RankLost as `decode` does."""
    _check(step, limits)
    pieces = [_HEADER.pack(_MAGIC, len(step.parts), len(step.copies), len(step.free))]
    try:
        pieces += [_TRIPLE.pack(part.slot, part.start, part.count) for part in step.parts]
        pieces += [_TRIPLE.pack(copy.source, copy.target, copy.count) for copy in step.copies]
        pieces += [_NUMBER.pack(slot) for slot in step.free]
    except struct.error as error:
        raise _lost(f"a number of it does not fit ({error})") from error
    return b"".join(pieces)


def decode(data: bytes, limits: LlmLimits = LlmLimits()) -> Step:
    """The step that `encode` wrote. Raises RankLost where the bytes are no step, or one beyond the limits.

    Whether slots and positions exist is for the holder of the slots to say.
    """
    if len(data) < _HEADER.size:
        raise _lost(f"{len(data)} bytes are shorter than its header")
    magic, parts, copies, free = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise _lost("it begins with other bytes")
    at_copies = _HEADER.size + parts * _TRIPLE.size
    at_free = at_copies + copies * _TRIPLE.size
    if len(data) != at_free + free * _NUMBER.size:
        raise _lost(f"{len(data)} bytes are not the length that its header promises")
    step = Step(
        tuple(Part(*numbers) for numbers in _TRIPLE.iter_unpack(data[_HEADER.size : at_copies])),
        tuple(Copy(*numbers) for numbers in _TRIPLE.iter_unpack(data[at_copies:at_free])),
        tuple(slot for (slot,) in _NUMBER.iter_unpack(data[at_free:])),
    )
    _check(step, limits)
    return step


def _check(step: Step, limits: LlmLimits) -> None:
    """Refuse what no holder of slots could do, whatever its size."""
    if step.tokens > limits.max_step_tokens:
        raise _lost(f"{step.tokens} tokens are more than the {limits.max_step_tokens} that one pass may have")
    if any(part.count < 1 for part in step.parts):
        raise _lost("a part has no tokens")
    if _repeats(part.slot for part in step.parts) or _repeats(step.free):
        raise _lost("a slot comes twice")
    if len(step.copies) > limits.max_slots:
        raise _lost(f"{len(step.copies)} copies are more than the {limits.max_slots} slots there can be")


def _repeats(slots: Iterable[int]) -> bool:
    listed = list(slots)
    return len(set(listed)) != len(listed)


def _lost(why: str) -> RankLost:
    return RankLost(f"A step cannot be used, as {why}; run the same version of fedge on all devices.")
