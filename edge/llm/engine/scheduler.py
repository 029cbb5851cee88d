"""What the next pass through the model computes: which tokens of which sequences, in which slots.

Continuous batching (Orca, OSDI 2022) with chunked prefill (Sarathi, arXiv 2308.16369): every pass takes the next token
of every running sequence, and as much of the waiting prompts as the pass has room for, first come first served. A slot
keeps its keys and values when its request has ended, and a later request that begins with the same tokens goes on from
there. State is explicit, and nothing here looks at a clock, a model or a text.

Keys and values of `tokens[:length]` lie in a slot. A running sequence always has one token or more beyond that: the
last one, whose logits nobody has seen.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedge.core.errors import ExperimentError
from fedge.core.params import Array
from fedge.edge.llm.engine.lookup import Lookup
from fedge.edge.llm.engine.requests import new_tokens
from fedge.edge.llm.ranks.step import Copy, Part, Step

MIN_COMMON = 16  # tokens; for fewer than these, what a slot holds is neither copied nor overwritten
MAX_DRAFT = 4  # tokens of one sequence in one pass
MAX_DRAFTED = 8  # tokens of all sequences: with many users a pass has no idle arithmetic left to spend on guesses


@dataclass(frozen=True, slots=True)
class Want:
    """Logits that are wanted: `1 + len(draft)` of the plan's rows from `row` on. The first one tells the next token of
    sequence `key`, each further one the token after one of the draft, provided the draft was right so far.
    """

    key: int
    row: int
    draft: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One pass: the step, its flattened tokens [step.tokens], and the rows of it whose logits are wanted (maybe none,
    where prompts are still being read).
    """

    step: Step
    tokens: Array
    rows: Array
    wants: tuple[Want, ...]


@dataclass(slots=True, eq=False)
class _Slot:
    """`high` positions have been written since the slot was last freed; that is the memory it holds."""

    index: int
    tokens: list[int] = field(default_factory=list)
    length: int = 0
    high: int = 0
    used_at: int = 0
    owner: "_Sequence | None" = None

    @property
    def held(self) -> int:
        """Tokens of the budget that are spoken for: a running sequence's all, so that it never has to make way."""
        owner = self.owner  # read once: figures are asked for from other threads
        return max(self.high, owner.most if owner else 0)


@dataclass(slots=True, eq=False)
class _Sequence:
    """`most` tokens at the end, the prompt with them."""

    key: int
    tokens: list[int]
    most: int
    lookup: Lookup | None
    reused: int = 0


@dataclass(slots=True)
class Scheduler:
    """All sequences and slots. Sizes in tokens: `context` of one slot, `max_kv_tokens` of all slots together (None: no
    bound but the slots), `step_tokens` of one pass, and `chunk_tokens` of prompts in a pass that others wait for.

    Raises ExperimentError for sizes that cannot work.
    """

    slot_count: int
    context: int
    step_tokens: int = 512
    chunk_tokens: int = 256
    max_kv_tokens: int | None = None
    slots: list[_Slot] = field(init=False)
    waiting: deque[_Sequence] = field(default_factory=deque, init=False)
    running: dict[int, _Slot] = field(default_factory=dict, init=False)
    reused_tokens: int = field(default=0, init=False)
    copied_tokens: int = field(default=0, init=False)
    _passes: int = field(default=0, init=False)
    _frees: set[int] = field(default_factory=set, init=False)
    _copies: list[Copy] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        sizes = (self.slot_count, self.context - 1, self.chunk_tokens, self.step_tokens - self.slot_count + 1)
        if min(sizes) < 1 or self.most_tokens < 2:
            raise ExperimentError(
                f"{self.slot_count} slots of {self.context} tokens, {self.max_kv_tokens} in all, in passes of "
                f"{self.step_tokens}, cannot work; allow 2 tokens in a slot and one per slot in a pass."
            )
        self.slots = [_Slot(index) for index in range(self.slot_count)]

    @property
    def most_tokens(self) -> int:
        """Of one sequence, prompt and answer."""
        return min(self.context, self.max_kv_tokens if self.max_kv_tokens is not None else self.context)

    @property
    def kv_tokens(self) -> int:
        """What the slots hold, or have promised to running sequences."""
        return sum(slot.held for slot in self.slots)

    def new_tokens(self, prompt: int, wanted: int) -> int:
        """How many tokens may follow a prompt of so many. Reads no state that changes. As requests.new_tokens."""
        return new_tokens(prompt, wanted, self.most_tokens)

    def add(self, key: int, prompt: Sequence[int], new_tokens: int, *, drafts: bool = False) -> None:
        """Let a sequence wait; `key` is new. `drafts` allows guesses. Raises as `new_tokens` does."""
        most = len(prompt) + self.new_tokens(len(prompt), new_tokens)
        self.waiting.append(_Sequence(key, list(prompt), most, Lookup(MAX_DRAFT) if drafts else None))

    def end(self, key: int) -> None:
        """A sequence is over, at whatever point; its slot keeps what it holds. Unknown keys are left alone."""
        slot = self.running.pop(key, None)
        if slot is not None:
            slot.owner = None
        else:
            self.waiting = deque(sequence for sequence in self.waiting if sequence.key != key)

    def forget(self) -> None:
        """No slot holds anything any more. Running sequences are computed again from their first token on."""
        for slot in self.slots:
            slot.length = slot.high = 0
        # All of them: the pass that failed may have been the one that was to free a slot.
        self._frees = set(range(self.slot_count))

    def reused(self, key: int) -> int:
        """Tokens of a running sequence's prompt that were taken from a slot."""
        slot = self.running.get(key)
        return slot.owner.reused if slot and slot.owner else 0

    def plan(self) -> Plan | None:
        """The next pass, or None where nobody has anything to compute. What it computes counts as done: where the pass
        fails, `forget` follows; where it succeeds, `accept` or `end` for each of its wants.
        """
        self._passes += 1
        self._admit()
        parts: list[Part] = []
        tokens: list[int] = []
        rows: list[int] = []
        wants: list[Want] = []
        for slot, count, draft in self._shares():
            start, slot.length = slot.length, slot.length + count
            parts.append(Part(slot.index, start, count + len(draft)))
            tokens += [*slot.tokens[start : start + count], *draft]
            slot.high = max(slot.high, slot.length + len(draft))
            slot.used_at = self._passes
            if slot.owner and slot.length == len(slot.tokens):
                wants.append(Want(slot.owner.key, len(rows), draft))
                rows += range(len(tokens) - len(draft) - 1, len(tokens))
        if not parts:
            return None
        step = Step(tuple(parts), tuple(self._copies), tuple(sorted(self._frees)))
        self._copies, self._frees = [], set()
        return Plan(step, np.array(tokens, np.int64), np.array(rows, np.int64), tuple(wants))

    def accept(self, want: Want, tokens: Sequence[int]) -> None:
        """The tokens that were chosen for a want of the last plan: one, and one more for each token of the draft that
        was right. (What a wrong draft has left in the slot is overwritten later.)
        """
        slot = self.running[want.key]
        slot.tokens += tokens
        slot.length += len(tokens) - 1
        if slot.owner and slot.owner.lookup and want.draft:
            slot.owner.lookup.learn(len(tokens) - 1)

    def _shares(self) -> Iterator[tuple[_Slot, int, tuple[int, ...]]]:
        """Who computes how many known tokens, and which guesses. Decoding sequences have one token each for sure."""
        decoding = sum(slot.length + 1 == len(slot.tokens) for slot in self.running.values())
        left, drafted = self.step_tokens - decoding, 0
        chunk = self.chunk_tokens if decoding else self.step_tokens
        for slot in self.running.values():
            behind = len(slot.tokens) - slot.length
            if behind == 1:
                draft = self._draft(slot, min(left // 2, MAX_DRAFTED - drafted))
                left, drafted = left - len(draft), drafted + len(draft)
                yield slot, 1, draft
            elif count := min(behind, chunk, left):
                left, chunk = left - count, chunk - count
                yield slot, count, ()

    def _draft(self, slot: _Slot, most: int) -> tuple[int, ...]:
        sequence = slot.owner
        if sequence is None or sequence.lookup is None:
            return ()
        # The last token is never guessed: with it the sequence would be longer than it may become.
        most = min(most, sequence.most - len(slot.tokens) - 1)
        return sequence.lookup.draft(slot.tokens, most) if most > 0 else ()

    def _admit(self) -> None:
        """Waiting sequences into slots, in order. The first one that has no room holds back those behind it, so that
        it is not passed by for ever.
        """
        while self.waiting and len(self.running) < len(self.slots):
            sequence = self.waiting[0]
            place = next((place for place in self._places(sequence) if self._fits(sequence, *place[:2])), None)
            if place is None:
                return
            self.waiting.popleft()
            self._start(sequence, *place)

    def _places(self, sequence: _Sequence) -> Iterator[tuple[_Slot, _Slot, int]]:
        """Where a sequence may go, best first: (slot with its beginning, slot it takes, tokens in common).

        It takes the idle slot that agrees longest, unless a busy one agrees longer, or most of what the idle one holds
        would be lost while an empty one is there: then the beginning is copied.
        """
        common = [_common(slot, sequence.tokens) for slot in self.slots]
        common = [length if length >= MIN_COMMON else 0 for length in common]
        idle = [slot for slot in self.slots if slot.owner is None]
        mine = max(idle, key=lambda slot: (common[slot.index], slot.length == 0, -slot.used_at))
        best = max(self.slots, key=lambda slot: (common[slot.index], slot is mine))
        shared = common[best.index]
        if shared:
            others = [slot for slot in idle if slot is not best]
            target = min(others, key=lambda slot: (slot.length > 0, slot.used_at), default=best)
            if target is not best and (best is not mine or (target.length == 0 and 2 * shared < mine.length)):
                yield best, target, shared
        yield mine, mine, common[mine.index]

    def _fits(self, sequence: _Sequence, source: _Slot, target: _Slot) -> bool:
        """Whether the budget allows it; idle slots, the oldest first, are freed where only that is in the way."""
        if self.max_kv_tokens is None:
            return True
        kept = {source.index, target.index, *(copy.source for copy in self._copies)}
        gone = [slot for slot in self.slots if slot.owner is None and slot.high and slot.index not in kept]
        over = self.kv_tokens - target.held + max(target.high, sequence.most) - self.max_kv_tokens
        if over > sum(slot.high for slot in gone):
            return False
        for slot in sorted(gone, key=lambda slot: slot.used_at):
            if over <= 0:
                break
            over -= slot.high
            self._free(slot)
        return True

    def _start(self, sequence: _Sequence, source: _Slot, target: _Slot, common: int) -> None:
        if source is not target:
            self._copies.append(Copy(source.index, target.index, common))
            self.copied_tokens += common
            source.used_at = self._passes
        elif not common and target.high and all(target.index != copy.source for copy in self._copies):
            self._free(target)  # a step frees before it copies
        target.owner, target.tokens, target.length = sequence, sequence.tokens, common
        target.high = max(target.high, common)
        sequence.reused = common
        self.reused_tokens += common
        self.running[sequence.key] = target

    def _free(self, slot: _Slot) -> None:
        self._frees.add(slot.index)
        slot.tokens, slot.length, slot.high = [], 0, 0


def _common(slot: _Slot, tokens: list[int]) -> int:
    """How many of the first tokens lie in the slot; not the last one of all, whose logits are wanted."""
    low, high = 0, min(slot.length, len(tokens) - 1)
    while low < high:  # whole slices are compared far faster than tokens one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if slot.tokens[low:middle] == tokens[low:middle] else (low, middle - 1)
    return low
