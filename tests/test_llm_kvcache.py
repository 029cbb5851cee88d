"""Slots: memory that comes when it is written and goes when it is freed."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from fedge.core.errors import ExperimentError, RankLost
from fedge.edge.llm.ranks.kvcache import KVCache
from fedge.edge.llm.ranks.step import Copy, Part, Step

MIB = 1 << 20


def _resident_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_comes_page_by_page_and_goes_with_the_sequence() -> None:
    before = _resident_bytes()
    cache = KVCache(8, 4, 64, slots=3, context=8192)  # 128 MiB each
    assert _resident_bytes() - before < 4 * MIB
    cache.begin(Step((Part(0, 0, 512), Part(1, 0, 512))))
    for layer in range(8):
        cache.entries[0][layer][:, :, :512] = 1
        cache.entries[1][layer][:, :, :512] = 2
    held = _resident_bytes() - before
    assert 15 * MIB < held < 20 * MIB
    cache.begin(Step((), free=(0,)))
    assert _resident_bytes() - before < held - 7 * MIB
    assert not cache.entries[0][3].any()
    assert (cache.entries[1][3][:, :, :512] == 2).all()
    cache.close()
    assert _resident_bytes() - before < 4 * MIB


def test_slots_do_not_share_memory_and_a_copy_takes_the_prefix_of_all_layers() -> None:
    cache = KVCache(2, 3, 4, slots=3, context=10)
    cache.begin(Step((Part(0, 0, 10), Part(1, 0, 10))))
    for slot in (0, 1):
        for layer in (0, 1):
            entry = cache.entries[slot][layer]
            assert entry.shape == (2, 3, 10, 4)
            entry[:] = np.arange(entry.size).reshape(entry.shape) + 1000 * slot + 500 * layer
    kept = [entry.copy() for entry in cache.entries[0]]
    cache.begin(Step((), (Copy(1, 2, 6), Copy(2, 0, 4)), free=(0,)))
    assert cache.lengths == [4, 10, 6]
    for layer in (0, 1):
        one, two, zero = (cache.entries[slot][layer] for slot in (1, 2, 0))
        assert np.array_equal(two[:, :, :6], one[:, :, :6])
        assert not two[:, :, 6:].any()
        assert np.array_equal(zero[:, :, :4], one[:, :, :4])
        assert not np.array_equal(one, kept[layer])


@pytest.mark.parametrize(
    "step",
    [
        Step((Part(2, 0, 1),)),
        Step((Part(-1, 0, 1),)),
        Step((Part(0, 4, 1),)),
        Step((Part(0, -1, 1),)),
        Step((Part(0, 3, 6),)),
        Step((Part(0, 3, 0),)),
        Step((Part(0, 3, 1),), free=(0,)),
        Step((), (Copy(0, 1, 3),), (0,)),
        Step((), (Copy(0, 1, -1),)),
        Step((), (Copy(1, 0, 1),)),
        Step((), free=(2,)),
    ],
)
def test_what_there_is_not_is_refused_and_nothing_changes(step: Step) -> None:
    cache = KVCache(1, 1, 2, slots=2, context=8)
    cache.begin(Step((Part(0, 0, 3),)))
    cache.entries[0][0][:] = 7
    with pytest.raises(RankLost, match="slot|position"):
        cache.check(step)
    assert cache.lengths == [3, 0]
    assert (cache.entries[0][0] == 7).all()


def test_the_last_position_and_going_back_are_allowed() -> None:
    cache = KVCache(1, 1, 2, slots=1, context=8)
    for part in (Part(0, 0, 3), Part(0, 3, 5), Part(0, 7, 1), Part(0, 2, 2), Part(0, 4, 4), Part(0, 0, 8)):
        cache.check(Step((part,)))
        cache.begin(Step((part,)))
        assert cache.lengths == [part.start + part.count]


def test_a_rank_without_heads_keeps_count_but_no_memory() -> None:
    cache = KVCache(2, 0, 64, slots=2, context=1 << 40)
    cache.begin(Step((Part(1, 0, 5),)))
    cache.begin(Step((), (Copy(1, 0, 5),), ()))
    cache.begin(Step((Part(0, 5, 1),), free=(1,)))
    assert cache.lengths == [6, 0]


@pytest.mark.parametrize(("slots", "context"), [(0, 8), (1, 0), (1, 1 << 50), (1, 1 << 62)])
def test_too_much_or_nothing_is_refused(slots: int, context: int) -> None:
    with pytest.raises(ExperimentError, match="ask for"):
        KVCache(2, 2, 64, slots=slots, context=context)
