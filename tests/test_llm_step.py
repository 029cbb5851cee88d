"""Steps and their bytes: what is no step, or too large a one, is refused and nothing else escapes."""

import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedge.core.errors import RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.ranks.step import Copy, Part, Step, decode, encode


def test_steps_survive_their_bytes() -> None:
    step = Step((Part(3, 500, 12), Part(0, 0, 500)), (Copy(3, 1, 7), Copy(1, 2, 4)), (5, 6))
    assert decode(encode(step)) == step
    assert decode(encode(Step(()))) == Step(())


@pytest.mark.parametrize(
    "step",
    [
        Step((Part(0, 0, 0),)),
        Step((Part(0, 0, -1), Part(1, 0, 5))),
        Step((Part(0, 0, 256), Part(1, 0, 257))),
        Step((Part(0, 0, 1), Part(0, 1, 1))),
        Step((), free=(1, 1)),
        Step((), (Copy(0, 1, 1),) * 17),
        Step((Part(-1, 0, 1),)),
        Step((), (Copy(0, 1, 1 << 32),)),
    ],
)
def test_a_step_that_no_rank_could_do_is_neither_sent_nor_received(step: Step) -> None:
    with pytest.raises(RankLost, match="step"):
        encode(step)
    numbers = [n for one in step.parts for n in (one.slot, one.start, one.count)]
    numbers += [n for one in step.copies for n in (one.source, one.target, one.count)]
    sizes = struct.pack("<4sIII", b"STP1", len(step.parts), len(step.copies), len(step.free))
    data = sizes + b"".join((n % 2**32).to_bytes(4, "little") for n in [*numbers, *step.free])
    if max(map(abs, numbers), default=0) < 1 << 32 and min(numbers, default=0) >= 0:
        with pytest.raises(RankLost, match="step"):
            decode(data)


NUMBER = st.integers(-1, 520) | st.integers(-(2**70), 2**70)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.builds(Part, NUMBER, NUMBER, NUMBER), max_size=4),
    st.lists(st.builds(Copy, NUMBER, NUMBER, NUMBER), max_size=20),
    st.lists(NUMBER, max_size=4),
)
def test_what_is_encoded_is_decoded_or_refused(parts: list[Part], copies: list[Copy], free: list[int]) -> None:
    step = Step(tuple(parts), tuple(copies), tuple(free))
    try:
        data = encode(step)
    except RankLost:
        return
    assert decode(data) == step


GOOD = encode(Step((Part(3, 500, 12), Part(0, 0, 400)), (Copy(3, 1, 7),), (5,)))


@settings(deadline=None, max_examples=80)
@given(st.binary(max_size=80) | st.builds(lambda at, bit: _flip(GOOD, at, bit), st.integers(0, 63), st.integers(0, 7)))
@example(GOOD[:-1])
@example(GOOD + b"\0")
@example(GOOD[:4] + b"\xff" * 12)
@example(b"PTS1" + GOOD[4:])
def test_bytes_are_a_step_within_the_limits_or_refused(data: bytes) -> None:
    try:
        step = decode(data)
    except RankLost:
        assert data != GOOD
        return
    assert encode(step) == data
    assert 0 <= step.tokens <= LlmLimits().max_step_tokens


def _flip(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
