"""Windows: every block comes with the right bytes in any order, within the budget; faults are told, not waited on."""

import ctypes
import errno
import mmap
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import ModelError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.compute import blockfile
from fedge.edge.llm.compute.kernels import KERNELS
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.compute.window import Window, pinned
from fedge.edge.llm.models import advice
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.shards.layout import BlockSpec
from fedge.edge.llm.shards.quant import KINDS
from fedge.edge.llm.shards.shard import export, open_shard, state_of
from fedge.edge.llm.shards.shares import even
from tests.llm_fixture import folder

PAGE = 4096
STREAMING = {kind: next(one for one in KERNELS.values() if one.kind == kind and one.streams) for kind in KINDS}


@dataclass(frozen=True)
class Bytes:
    """As much of a shard as a window uses: blocks of any sizes, whose only view is their bytes."""

    path: Path
    blocks: tuple[BlockSpec, ...]
    mapped: memoryview
    state: tuple[int, ...]
    ranks: int = 1

    def view(self, block: BlockSpec, buffer: Array) -> dict[str, Array]:
        return {"all": buffer[: block.bytes]}


def file_of(path, sizes, seed=0):
    """A file of random bytes after one page, and its blocks, `sizes` in pages."""
    blocks, at = [], PAGE
    for index, size in enumerate(sizes):
        blocks.append(BlockSpec(index, index // 2, "attn", at, size * PAGE))
        at += size * PAGE
    path.write_bytes(np.random.default_rng(seed).integers(0, 256, at, np.uint8).tobytes())
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return Bytes(path, tuple(blocks), mapped, state_of(file.fileno()))


def use(window, indices):
    """Take and release these blocks."""
    for index in indices:
        window.take(index)
        window.release(index)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Rank 0's shard of a small model, by kind."""
    tmp = tmp_path_factory.mktemp("shards")
    opened = open_folder(folder(tmp, layers=3, vocab=600))
    return {kind: open_shard(export(opened, tmp / kind, even(opened.config, 2), kind)[0]) for kind in KINDS}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    extra=st.integers(0, 40),
    passes=st.integers(1, 3),
    left_out=st.sets(st.integers(0, 8), max_size=4),
    direct=st.sampled_from([True, False, None]),
)
def test_every_take_has_the_right_bytes(tmp_path_factory, sizes, extra, passes, left_out, direct):
    shard = file_of(tmp_path_factory.getbasetemp() / "law", sizes, len(sizes))
    whole = np.fromfile(shard.path, np.uint8)
    window = Window(shard, STREAMING["int8"], (least(sizes) + extra) * PAGE, direct)
    try:
        for _ in range(passes):
            for block in shard.blocks:
                if block.index in left_out:
                    continue
                found = window.take(block.index)["all"]
                assert np.array_equal(found, whole[block.offset : block.offset + block.bytes])
                window.release(block.index)
    finally:
        window.close()


def least(sizes):
    """The smallest budget, by trying: two buffers for the largest streamed block beside the larger ones."""
    return min(2 * most + sum(size for size in sizes if size > most) for most in {0, *sizes})


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), budget=st.integers(0, 900))
def test_what_stays_fits_and_wastes_little(sizes, budget):
    if budget < least(sizes):
        with pytest.raises(ModelError, match=f"allow {least(sizes)} or more"):
            pinned(sizes, budget)
        return
    stay = pinned(sizes, budget)
    streamed = [size for index, size in enumerate(sizes) if index not in stay]
    used = sum(sizes) - sum(streamed) + 2 * max(streamed, default=0)
    assert used <= budget
    assert all(used + size > budget for size in streamed)  # nothing more would fit


def test_what_stays_is_spread_and_the_large_head_stays_first():
    sizes = [10] * 20 + [100]
    stay = pinned(sizes, 100 + 20 + 50)
    assert 20 in stay  # else both buffers would have to hold it
    gaps = np.diff(sorted(stay - {20}))
    assert len(stay) == 6
    assert set(gaps) == {4}


@pytest.mark.parametrize("kind", KINDS)
def test_windowed_results_are_the_resident_ones_to_the_bit(shards, kind):
    shard, kernel = shards[kind], STREAMING[kind]
    resident = Resident(shard, kernel)
    sizes = [block.bytes for block in shard.blocks]
    budget = least(sizes) + min(sizes)
    assert 0 < len(pinned(sizes, budget)) < len(sizes)
    window = Window(shard, kernel, budget)
    try:
        for block in [*shard.blocks, *shard.blocks]:
            wanted, found = resident.take(block.index), window.take(block.index)
            assert wanted.keys() == found.keys()
            for name, one in found.items():
                if callable(one):
                    columns = {"qkv": 64, "gate_up": 64, "head": 64, "o": 32}.get(name, 64)
                    x = np.random.default_rng(1).standard_normal((3, columns), np.float32)
                    assert np.array_equal(one(x), wanted[name](x))
                else:
                    assert np.array_equal(one, wanted[name])
            window.release(block.index)
    finally:
        window.close()
        resident.close()


@pytest.mark.parametrize("name", sorted(name for name, kernel in KERNELS.items() if not kernel.streams))
def test_resident_kernels_that_copy_outlive_the_pages(shards, name):
    shard, kernel = shards[KERNELS[name].kind], KERNELS[name]
    resident, plain = Resident(shard, kernel), Resident(shard, STREAMING[kernel.kind])
    x = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    y, wanted = (one.take(len(shard.blocks) - 1)["head"](x) for one in (resident, plain))
    assert np.abs(y - wanted).max() < 0.05 * np.abs(wanted).max()
    resident.close()
    resident.close()
    plain.close()


def cached(path, first, last):
    """Whether any page of these bytes lies in the system's cache; asked without reading, which would bring it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        whole = np.frombuffer(mapped, np.uint8)
        begin, size = advice.outward(first, last - first)
        there = np.zeros(size // mmap.PAGESIZE, np.uint8)
        at, size = ctypes.c_void_p(whole.ctypes.data + begin), ctypes.c_size_t(min(size, len(mapped) - begin))
        assert ctypes.CDLL(None).mincore(at, size, ctypes.c_void_p(there.ctypes.data)) == 0
        del whole
    return bool((there & 1).any())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what its cache holds")
def test_what_was_copied_leaves_the_cache(tmp_path):
    opened = open_folder(folder(tmp_path, hidden=128, ffn=512, vocab=600))
    path = export(opened, tmp_path / "out", even(opened.config, 1), "int8")[0]
    shard = open_shard(path)
    ends = shard.blocks[0].offset, shard.blocks[-1].offset + shard.blocks[-1].bytes
    assert cached(path, *ends)
    blocks = Resident(shard, KERNELS["onnx-int8"])
    taken = [blocks.take(block.index) for block in shard.blocks]
    taken[-1]["head"](np.ones((1, 128), np.float32))
    assert all(one["norm"].any() for one in taken)  # these are used at every token
    assert not cached(path, *ends)
    for block, one in zip(shard.blocks, taken):
        there = shard.view(block, shard.mapped[block.offset : block.offset + block.bytes])
        assert np.array_equal(one["norm"], there["norm"])
    blocks.close()


def test_a_kernel_that_copies_has_no_window(shards):
    with pytest.raises(ModelError, match="streams"):
        Window(shards["int8"], KERNELS["onnx-int8"], 1 << 30)


def test_it_reads_ahead_into_the_next_pass(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [1, 1, 1, 1])
    came = []
    read = blockfile.BlockFile.read
    monkeypatch.setattr(
        blockfile.BlockFile, "read", lambda self, block, buffer: (read(self, block, buffer), came.append(block.index))
    )
    window = Window(shard, STREAMING["int8"], 2 * PAGE, False)
    try:
        for block in shard.blocks:
            window.take(block.index)
            window.release(block.index)
        deadline = time.monotonic() + 30
        while len(came) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert came == [0, 1, 2, 3, 0, 1]  # two more than were taken: the buffers are full
    finally:
        window.close()


def test_a_third_block_in_use_is_refused_not_waited_for(tmp_path):
    shard = file_of(tmp_path / "file", [1, 1, 1])
    window = Window(shard, STREAMING["int8"], 2 * PAGE)
    try:
        first = window.take(0)["all"]
        assert window.take(0)["all"] is first
        window.take(1)
        with pytest.raises(ModelError, match="release one before block 2"):
            window.take(2)
        window.release(0)
        assert window.take(2)["all"].size == PAGE
    finally:
        window.close()


@pytest.mark.parametrize("index", [-1, 3])
def test_a_block_that_is_not_there_is_refused(tmp_path, index):
    window = Window(file_of(tmp_path / "file", [1, 1, 1]), STREAMING["int8"], 2 * PAGE)
    try:
        with pytest.raises(ModelError, match=f"no block {index}"):
            window.take(index)
    finally:
        window.close()


def truncated(path):
    os.truncate(path, 3 * PAGE)


def overwritten(path):
    with path.open("r+b") as file:
        file.seek(2 * PAGE)
        file.write(b"other")


@pytest.mark.parametrize(
    ("harm", "direct"),  # who reads pages that are lent and then cut off before the next read is killed by the system
    [(harm, direct) for harm in (truncated, overwritten) for direct in (True, False, None)],
)
def test_a_file_that_changes_while_in_use_is_told(tmp_path, harm, direct):
    shard = file_of(tmp_path / "file", [1] * 8)
    window = Window(shard, STREAMING["int8"], 2 * PAGE, direct)
    try:
        window.take(0)
        harm(shard.path)
        window.release(0)
        for _ in range(2):
            with pytest.raises(ModelError, match=r"changed|ends within|cannot be read"):
                use(window, range(1, 8))
    finally:
        window.close()


def test_a_file_that_is_replaced_goes_on_as_it_was(tmp_path):
    shard = file_of(tmp_path / "file", [1] * 4)
    whole = np.fromfile(shard.path, np.uint8)
    window = Window(shard, STREAMING["int8"], 2 * PAGE)
    try:
        file_of(tmp_path / "new", [1] * 4, seed=1)
        (tmp_path / "new").replace(shard.path)
        for block in (*shard.blocks, *shard.blocks):
            found = window.take(block.index)["all"]
            assert np.array_equal(found, whole[block.offset : block.offset + PAGE])
            window.release(block.index)
    finally:
        window.close()


def test_a_disk_that_hangs_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [1] * 4)
    go = threading.Event()
    window = Window(shard, STREAMING["int8"], 2 * PAGE, False, limits=replace(LlmLimits(), step_timeout_s=0.05))
    try:
        monkeypatch.setattr(window._file, "read", lambda *_: go.wait(60))
        with pytest.raises(ModelError, match="check the disk"):
            use(window, range(4))
    finally:
        go.set()
        window.close()


def test_a_missing_file_is_refused(tmp_path):
    shard = file_of(tmp_path / "file", [1, 1, 1])
    shard.path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        Window(shard, STREAMING["int8"], 2 * PAGE)


def test_closing_ends_the_thread_and_whoever_waits(tmp_path):
    window = Window(file_of(tmp_path / "file", [1, 1, 1]), STREAMING["int8"], 2 * PAGE)
    window.close()
    window.close()
    assert "fedge-window" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ModelError, match="closed"):
        window.take(0)


def test_without_room_reads_go_past_the_cache(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [64] * 2)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 128 * PAGE)  # the file has one page more
    file = blockfile.open_blocks(shard, shard.blocks[0], 0, None)
    refused = blockfile.open_blocks(shard, shard.blocks[0], 0, False)
    assert (file.direct, refused.direct, refused.keep) == (True, False, False)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 140 * PAGE)
    assert not blockfile.open_blocks(shard, shard.blocks[0], 20 * PAGE, False).keep
    assert blockfile.open_blocks(shard, shard.blocks[0], 2 * PAGE, False).keep


def test_room_must_be_there_for_the_files_of_all_ranks(tmp_path, monkeypatch):
    shard = replace(file_of(tmp_path / "file", [64] * 2), ranks=4)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 4 * 129 * PAGE)
    assert isinstance(blockfile.open_blocks(shard, shard.blocks[0], 0, None), blockfile.BlockFile)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 4 * 129 * PAGE + 1)
    assert isinstance(blockfile.open_blocks(shard, shard.blocks[0], 0, None), blockfile.Lent)


def test_with_room_for_the_file_the_caches_pages_are_lent(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [64] * 2)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 140 * PAGE)
    lent, buffer = blockfile.open_blocks(shard, shard.blocks[0], 0, None), blockfile.pages(PAGE)
    lent.read(shard.blocks[1], buffer)
    assert np.array_equal(lent.place(shard.blocks[1], buffer), np.fromfile(shard.path, np.uint8)[-64 * PAGE :])
    assert not buffer.any()
    monkeypatch.setattr(advice, "_POPULATE_READ", 9999)  # an older system
    refused = blockfile.open_blocks(shard, shard.blocks[0], 0, None)
    assert isinstance(refused, blockfile.BlockFile)
    assert refused.keep


def lending(shard, budget, monkeypatch):
    """A window that lends, whatever memory there is."""
    monkeypatch.setattr(blockfile, "room_bytes", lambda: float("inf"))
    return Window(shard, STREAMING["int8"], budget)


def test_pages_larger_than_a_shards_are_asked_for_as_wholes(tmp_path, monkeypatch):
    shard, page, asked = file_of(tmp_path / "file", [1, 6, 3]), 16384, []
    base = np.frombuffer(shard.mapped, np.uint8).ctypes.data
    monkeypatch.setattr(advice, "PAGE", page)
    monkeypatch.setattr(advice, "_madvise", lambda: lambda at, size, what: asked.append((at - base, size, what)))
    file = blockfile.open_blocks(shard, shard.blocks[0], 0, None)
    assert isinstance(file, blockfile.Lent)
    file.read(shard.blocks[1], blockfile.pages(6 * PAGE))  # pages 2 to 7 of 4096, 0 and 1 of the system's
    file.drop(shard.blocks[2])  # 8 to 10; the last page of the system's goes beyond the file
    assert asked[1:] == [(0, 2 * page, 22), (2 * page, 3 * PAGE, mmap.MADV_DONTNEED)]
    assert not any(at % page for at, _, _ in asked)


def test_a_kernel_that_copies_starts_where_pages_are_larger(shards, monkeypatch):
    shard, page, asked = shards["int8"], 16384, []
    base = np.frombuffer(shard.mapped, np.uint8).ctypes.data
    monkeypatch.setattr(advice, "PAGE", page)
    monkeypatch.setattr(advice, "_madvise", lambda: lambda at, size, what: asked.append((at - base, size)))
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, at, size, what: told.append((at, size)))
    Resident(shard, KERNELS["onnx-int8"]).close()
    assert len(asked) == len(told) == len(shard.blocks)
    assert not any(at % page for at, _ in (*asked, *told))
    for block, (at, size) in zip(sorted(shard.blocks, key=lambda one: -one.bytes), asked):
        assert at <= block.offset < block.offset + block.bytes <= at + size


def test_rows_here_and_there_begin_after_the_page_of_the_block_before(tmp_path, monkeypatch):
    shard, asked = file_of(tmp_path / "file", [3, 9]), []
    base = np.frombuffer(shard.mapped, np.uint8).ctypes.data
    monkeypatch.setattr(advice, "PAGE", 16384)
    monkeypatch.setattr(advice, "_madvise", lambda: lambda at, size, what: asked.append((at - base, size, what)))
    advice.scattered(shard.mapped, 5 * PAGE, 8 * PAGE)
    advice.scattered(shard.mapped, 5 * PAGE, PAGE)  # within one page that is not its own
    assert asked == [(8 * PAGE, 5 * PAGE, mmap.MADV_RANDOM)]


def test_what_is_no_file_is_never_let_go():
    room = np.ones(4 * mmap.PAGESIZE, np.uint8)
    begin = -room.ctypes.data % mmap.PAGESIZE
    mine = room[begin : begin + 2 * mmap.PAGESIZE]
    advice.drop(memoryview(mine), 0, len(mine))
    assert mine.all()


def test_other_threads_run_while_pages_are_brought(tmp_path):
    # With Python's own madvise nothing ticks in between. A busy machine may also keep the other thread waiting.
    assert any(longest_silence(tmp_path / f"sparse-{at}") < 0.8 for at in range(10))


def longest_silence(path):
    """How long another thread was kept from running while pages were brought, as a share of the whole time."""
    size = 128 << 20
    with path.open("w+b") as file:
        file.truncate(size)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    ticks, over = [], threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        begin = time.perf_counter()
        advice.fetch(mapped, 0, size)
        end = time.perf_counter()
    finally:
        over.set()
        thread.join()
    within = [begin, *(at for at in ticks if begin < at < end), end]
    return max(np.diff(within)) / (end - begin)


def descriptors(path):
    """Open descriptors of a file in this process; a map has one of its own."""
    return [one for one in Path("/proc/self/fd").iterdir() if os.path.realpath(one) == str(path.resolve())]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux tells what is open")
@pytest.mark.parametrize("room", [0, float("inf")])
def test_a_way_of_reading_that_is_refused_leaves_nothing_open(tmp_path, monkeypatch, room):
    shard = file_of(tmp_path / "file", [4] * 2)
    before = len(descriptors(shard.path))
    monkeypatch.setattr(blockfile, "room_bytes", lambda: room)

    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse)
        patch.setattr(advice, "_madvise", lambda: None)
        file = blockfile.open_blocks(shard, shard.blocks[0], 0, None)
    assert isinstance(file, blockfile.BlockFile)
    assert not file.direct
    assert len(descriptors(shard.path)) == before + 1
    file.close()
    with pytest.raises(ModelError, match="allow this process more memory"):
        blockfile.pages(1 << 60)


def test_a_system_without_advice_and_direct_reads_is_read_through_the_cache(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [1] * 4)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 0)
    monkeypatch.setattr(blockfile, "_DIRECT", 0)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    window = Window(shard, STREAMING["int8"], 2 * PAGE)
    try:
        use(window, range(4))
    finally:
        window.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux tells what is open")
def test_a_window_that_finds_no_memory_leaves_nothing_open(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [1] * 4)
    before = len(descriptors(shard.path))

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("fedge.edge.llm.compute.window.pages", full)
    with pytest.raises(MemoryError):
        Window(shard, STREAMING["int8"], 2 * PAGE, False)
    assert len(descriptors(shard.path)) == before


def test_a_file_that_changes_while_its_pages_are_brought_is_told(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [1] * 4)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: float("inf"))
    lent = blockfile.open_blocks(shard, shard.blocks[0], 0, None)
    monkeypatch.setattr(advice, "fetch", lambda *_: overwritten(shard.path))
    with pytest.raises(ModelError, match="changed"):
        lent.read(shard.blocks[0], blockfile.pages(PAGE))


def test_what_stays_is_a_copy_that_no_change_of_the_file_reaches(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [1] * 4)
    whole = np.fromfile(shard.path, np.uint8)
    window = lending(shard, 4 * PAGE, monkeypatch)
    try:
        assert isinstance(window._file, blockfile.Lent)
        overwritten(shard.path)
        for block in shard.blocks:
            found = window.take(block.index)["all"]
            assert np.array_equal(found, whole[block.offset : block.offset + PAGE])
    finally:
        window.close()


def mapped_bytes(path):
    """Of a file, those that lie in this process's memory by a map."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux tells what is mapped")
def test_a_closed_window_lends_no_pages_any_more(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [64] * 4)
    window = lending(shard, 2 * 64 * PAGE, monkeypatch)
    held = window.take(0)["all"]
    assert held.any()
    assert mapped_bytes(shard.path) >= 64 * PAGE
    window.close()
    assert mapped_bytes(shard.path) == 0
    assert len(descriptors(shard.path)) == 1  # the shard's own map


@pytest.mark.parametrize("direct", [True, False, None])
def test_a_file_that_is_another_than_the_shards_is_refused(tmp_path, direct):
    shard = file_of(tmp_path / "file", [1] * 4)
    file_of(tmp_path / "new", [1] * 4, seed=1)
    (tmp_path / "new").replace(shard.path)
    before = len(descriptors(shard.path))
    with pytest.raises(ModelError, match="changed"):
        Window(shard, STREAMING["int8"], 2 * PAGE, direct)
    assert len(descriptors(shard.path)) == before


def test_a_file_system_without_direct_reads_is_read_through_the_cache(tmp_path, monkeypatch):
    shard = file_of(tmp_path / "file", [4] * 2)
    monkeypatch.setattr(blockfile, "_DIRECT", 0)
    monkeypatch.setattr(blockfile, "room_bytes", lambda: 0)
    assert not blockfile.open_blocks(shard, shard.blocks[0], 0, None).direct
    with pytest.raises(ModelError, match="choose buffered"):
        Window(shard, STREAMING["int8"], 32 * PAGE, True)
