"""Shards: together they are the model, each file is what it says, and what is no shard is refused."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from fedge.core.errors import DataError, ExperimentError, ModelError
from fedge.edge.llm.models.folder import EMBEDDING, SINGLE, open_folder
from fedge.edge.llm.shards import export as exporting
from fedge.edge.llm.shards.about import fault
from fedge.edge.llm.shards.layout import PAGE
from fedge.edge.llm.shards.quant import KINDS, Matrix, quantise
from fedge.edge.llm.shards.shard import digest, export, open_shard
from fedge.edge.llm.shards.shares import Share, bytes_of, even
from tests.llm_fixture import folder, write

UNEVEN = (Share((0, 1), (0, 96)), Share((1, 1), (96, 96)), Share((1, 2), (96, 100)))
MODELS = {
    "llama": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 48},
}


def cut(tmp_path, shares=None, kind="int8", **options):
    """An open folder and its shards; `options` of export and of the folder."""
    how = {name: options.pop(name) for name in ("layers", "with_head", "progress") if name in options}
    opened = open_folder(folder(tmp_path, **{"ffn": 100, **options, "layers": 3}))
    paths = export(opened, tmp_path / "out", shares or even(opened.config, 2), kind, **how)
    return opened, [open_shard(path) for path in paths]


def expected(opened, shard, block):
    """The matrices of a block, by slicing whole tensors."""
    config, share, first = opened.config, shard.share, shard.rank == 0
    if block.part == "head":
        name = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        return {"head": quantise(opened.tensor(name), "int8" if shard.kind == "int4" else shard.kind)}
    keys = slice(share.kv_heads[0] * config.head_dim, share.kv_heads[1] * config.head_dim)
    queries = slice(keys.start * config.group, keys.stop * config.group)
    columns, layer = slice(*share.ffn), f"model.layers.{block.layer}"

    def stacked(end, parts):
        return np.concatenate([opened.tensor(f"{layer}.{part}.{end}")[rows] for part, rows in parts])

    if block.part == "attn":
        parts = [(f"self_attn.{name}_proj", rows) for name, rows in (("q", queries), ("k", keys), ("v", keys))]
        into, out, bias, out_bias = "qkv", "o", config.qkv_bias, config.o_bias
        last, taken = "self_attn.o_proj", queries
    else:
        parts = [(f"mlp.{name}_proj", columns) for name in ("gate", "up")]
        into, out, bias, out_bias = "gate_up", "down", config.ffn_bias, config.ffn_bias
        last, taken = "mlp.down_proj", columns
    row = quantise(stacked("weight", parts), shard.kind, stacked("bias", parts) if bias else None)
    end = opened.tensor(f"{layer}.{last}.bias") if out_bias and first else None
    return {into: row, out: quantise(opened.tensor(f"{layer}.{last}.weight")[:, taken], shard.kind, end)}


def assert_same(one, other):
    assert (one.kind, one.rows, one.columns) == (other.kind, other.rows, other.columns)
    np.testing.assert_array_equal(one.data, other.data, strict=True)
    np.testing.assert_array_equal(one.scale, other.scale, strict=True)
    assert (one.bias is None) == (other.bias is None)
    if one.bias is not None:
        np.testing.assert_array_equal(one.bias, other.bias, strict=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("shares", [None, UNEVEN], ids=["even", "uneven"])
def test_shards_hold_their_rows_and_columns_of_the_model(tmp_path, kind, family, shares):
    opened, shards = cut(tmp_path, shares, kind, **MODELS[family])
    for shard in shards:
        assert (shard.kind, shard.config, shard.model) == (kind, opened.config, opened.digest)
        parts = [(layer, part) for layer in range(3) for part in ("attn", "ffn")]
        parts += [(3, "head")] if shard.rank == 0 else []
        assert [(block.layer, block.part) for block in shard.blocks] == parts
        for block in shard.blocks:
            found = shard.view(block, shard.mapped[block.offset :])
            for name, matrix in expected(opened, shard, block).items():
                assert_same(found.pop(name), matrix)
            norms = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}
            prefix = f"model.layers.{block.layer}"
            norm = f"{prefix}.{norms[block.part]}.weight" if block.part in norms else "model.norm.weight"
            np.testing.assert_array_equal(found.pop("norm"), opened.tensor(norm), strict=True)
            for name, array in found.items():
                assert family == "qwen3"
                np.testing.assert_array_equal(array, opened.tensor(f"{prefix}.self_attn.{name}.weight"), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_whole_pages_that_follow_each_other_and_the_planner_knows_their_bytes(tmp_path, kind):
    opened, shards = cut(tmp_path, UNEVEN, kind)
    for shard in shards:
        ends = [block.offset + block.bytes for block in shard.blocks]
        assert [block.offset for block in shard.blocks[1:]] == ends[:-1]
        assert all(block.offset % PAGE == block.bytes % PAGE == 0 for block in shard.blocks)
        assert [block.index for block in shard.blocks] == list(range(len(shard.blocks)))
        size = sum(block.bytes for block in shard.blocks)
        assert bytes_of(opened.config, shard.share, kind, shard.rank == 0) == size
        embedding = opened.config.vocab * opened.config.hidden * 4 if shard.rank == 0 else 0
        assert len(shard.mapped) == shard.blocks[0].offset + size + embedding == shard.path.stat().st_size


def test_a_block_is_viewed_without_a_copy_wherever_it_lies(tmp_path):
    _, (shard, _) = cut(tmp_path, kind="int4", family="qwen3")
    for block in shard.blocks:
        buffer = np.zeros(block.bytes + 100, np.uint8)
        found = shard.view(block, buffer)
        buffer[: block.bytes] = shard.mapped[block.offset : block.offset + block.bytes]
        there = shard.view(block, shard.mapped[block.offset : block.offset + block.bytes])
        for name, item in found.items():
            if isinstance(item, Matrix):
                assert np.shares_memory(item.data, buffer)
                assert item.data.__array_interface__["data"][0] % 16 == buffer.ctypes.data % 16
                assert_same(item, there[name])
            else:
                np.testing.assert_array_equal(item, there[name])


def test_tensors_begin_at_cache_lines_whatever_their_sizes(tmp_path):
    shares = (Share((0, 1), (0, 96)), Share((1, 3), (96, 99)))
    _, shards = cut(tmp_path, shares, "int8", ffn=99, hidden=36, heads=3, kv_heads=3, head_dim=10, vocab=97)
    for shard in shards:
        for block in shard.blocks:
            buffer = np.zeros(block.bytes, np.uint8)
            for item in shard.view(block, buffer).values():
                for array in (item.data, item.scale) if isinstance(item, Matrix) else (item,):
                    assert (array.ctypes.data - buffer.ctypes.data) % 64 == 0 or not array.size


def test_a_shard_is_a_safetensors_file(tmp_path):
    _, shards = cut(tmp_path, kind="int4")
    for shard in shards:
        tensors = load_file(shard.path)
        block = shard.blocks[0]
        qkv = shard.view(block, shard.mapped[block.offset :])["qkv"]
        np.testing.assert_array_equal(tensors["layers.0.attn.qkv.weight"], qkv.data)
        np.testing.assert_array_equal(tensors["layers.0.attn.qkv.scale"], qkv.scale)
        with safe_open(shard.path, "numpy") as file:
            assert json.loads(file.metadata()["fedge"])["rank"] == shard.rank


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_embedding_is_the_folder_s_to_the_bit(tmp_path, dtype):
    opened, (first, second) = cut(tmp_path, dtype=dtype)
    ids = [5, 0, 127, 5]
    np.testing.assert_array_equal(first.embed(ids), opened.embed(ids), strict=True)
    assert first.embed([]).shape == (0, 64)
    for wrong in ([128], [3, -1]):
        with pytest.raises(DataError, match="outside"):
            first.embed(wrong)
    with pytest.raises(ModelError, match="no embedding"):
        second.embed([1])


def test_a_model_is_split_between_a_device_and_a_cloud(tmp_path):
    opened, (edge,) = cut(tmp_path / "edge", even_one(tmp_path), layers=(0, 1), with_head=True)
    (path,) = export(opened, tmp_path / "edge" / "out", even(opened.config, 1), "int8", layers=(1, 3))
    cloud = open_shard(path)
    assert edge.path != cloud.path
    assert [(block.layer, block.part) for block in edge.blocks] == [(0, "attn"), (0, "ffn"), (3, "head")]
    assert [block.layer for block in cloud.blocks] == [1, 1, 2, 2, 3]
    assert (edge.layers, cloud.layers) == (range(1), range(1, 3))
    assert edge.embed([1]).shape == (1, 64)
    with pytest.raises(ModelError, match="no embedding"):
        cloud.embed([1])
    for shard in (edge, cloud):
        for block in shard.blocks:
            found = shard.view(block, shard.mapped[block.offset :])
            for name, matrix in expected(opened, shard, block).items():
                assert_same(found[name], matrix)
    (bare,) = export(opened, tmp_path, even(opened.config, 1), "int8", layers=(0, 1))
    assert [block.part for block in open_shard(bare).blocks] == ["attn", "ffn"]


def even_one(tmp_path):
    return even(open_folder(folder(tmp_path, ffn=100, layers=3)).config, 1)


def test_exporting_again_gives_the_same_file_and_tells_how_far_it_is(tmp_path):
    told = []
    opened, shards = cut(tmp_path, progress=lambda done, total: told.append((done, total)))
    before = [digest(shard.path) for shard in shards]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {sum(len(shard.mapped) for shard in shards)} == {told[-1][0]}
    export(opened, tmp_path / "out", shards[0].shares, "int8")
    assert [digest(shard.path) for shard in shards] == before
    assert len(set(before)) == 2
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    opened, (first, *_) = cut(tmp_path)
    before = digest(first.path)

    def stop(done, total):
        if done > total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(opened, tmp_path / "out", first.shares, "int8", progress=stop)
    assert digest(first.path) == before
    assert not list((tmp_path / "out").glob("*.part"))
    with pytest.raises(ModelError, match="cannot be written"):
        export(opened, first.path, first.shares, "int8")


def test_two_exports_of_one_file_do_not_meet(tmp_path):
    opened, (first, *_) = cut(tmp_path)
    before = digest(first.path)
    told = []

    def again(done, total):
        if not told:
            told.append(done)
            export(opened, tmp_path / "out", first.shares, "int8")

    export(opened, tmp_path / "out", first.shares, "int8", progress=again)
    assert digest(first.path) == before
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize(
    "name",
    [
        EMBEDDING,
        "model.norm.weight",
        *(f"model.layers.1.self_attn.{name}" for name in ("o_proj.weight", "q_proj.bias")),
    ],
)
def test_numbers_that_are_not_finite_are_not_cut(tmp_path, kind, name):
    path = folder(tmp_path, "qwen2")
    tensors = {key: value.copy() for key, value in load_file(path / SINGLE).items()}
    tensors[name].flat[-1] = np.nan
    write(path / SINGLE, tensors)
    with open_folder(path) as opened, pytest.raises(ModelError, match="not finite"):
        export(opened, tmp_path / "out", even(opened.config, 1), kind)
    assert not list((tmp_path / "out").iterdir())


def test_an_export_has_a_slab_in_memory_and_not_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_SLAB_BYTES", 1 << 16)
    opened = open_folder(folder(tmp_path, hidden=256, ffn=2048, layers=1, vocab=512))
    tracemalloc.start()
    try:
        export(opened, tmp_path, even(opened.config, 2), "int8")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < opened.config.ffn * opened.config.hidden * 4 / 4


@pytest.mark.parametrize(
    "shares",
    [
        (),
        (Share((0, 1), (0, 100)),),
        (Share((0, 2), (0, 40)), Share((2, 2), (40, 100))),
        (Share((0, 2), (0, 96)), Share((1, 2), (96, 100))),
        (Share((0, 2), (0, 64)), Share((2, 2), (96, 100))),
        (Share((0, 2), (0, 100)),) + (Share((2, 2), (100, 100)),) * 64,
    ],
)
def test_shares_that_do_not_fit_are_refused(tmp_path, shares):
    opened = open_folder(folder(tmp_path, ffn=100))
    with pytest.raises(ExperimentError, match="shared"):
        export(opened, tmp_path / "out", shares, "int8")


# What follows are files from a stranger.


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The bytes of a good shard."""
    _, (shard, _) = cut(tmp_path_factory.mktemp("raw"), layers=(0, 2), kind="int4", hidden=32, vocab=100, ffn=32)
    return shard.path.read_bytes()


def refused(tmp_path_factory, data):
    """None if the file is refused as it should be; else the shard, every block of which can be viewed."""
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    path.write_bytes(data)
    try:
        shard = open_shard(path)
    except ModelError:
        return None
    for block in shard.blocks:
        shard.view(block, shard.mapped[block.offset : block.offset + block.bytes])
    return shard


def with_header(raw, change):
    """The file with another header, made by `change(header, facts)`."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["fedge"])
    change(header, facts)
    if "fedge" in header.get("__metadata__", {}):
        header["__metadata__"]["fedge"] = json.dumps(facts)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def test_a_header_that_only_looks_different_is_accepted(raw, tmp_path_factory):
    assert refused(tmp_path_factory, with_header(raw, lambda header, facts: None)) is not None


YARN = {"kind": "yarn", "factor": 2.0, "original_context": 64, "beta_fast": 32.0, "beta_slow": 1.0}
YARN |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
CHANGES = {
    "format": lambda header, facts: facts.update(format=1),
    "kind": lambda header, facts: facts.update(kind="int8"),
    "no kind": lambda header, facts: facts.update(kind="int2"),
    "rank": lambda header, facts: facts.update(rank=1),
    "negative rank": lambda header, facts: facts.update(rank=-1),
    "no shares": lambda header, facts: facts.update(shares=[]),
    "overlap": lambda header, facts: facts["shares"][1].update(kv_heads=[0, 2]),
    "order": lambda header, facts: facts["shares"].reverse(),
    "layers": lambda header, facts: facts.update(layers=[0, 1]),
    "backward layers": lambda header, facts: facts.update(layers=[2, 1]),
    "huge layers": lambda header, facts: (facts["config"].update(layers=10**9), facts.update(layers=[0, 10**9])),
    "huge size": lambda header, facts: facts["config"].update(hidden=2**62),
    "no heads": lambda header, facts: facts["config"].update(kv_heads=0),
    "odd heads": lambda header, facts: facts["config"].update(heads=3),
    "odd head size": lambda header, facts: facts["config"].update(head_dim=7),
    "eps": lambda header, facts: facts["config"].update(eps=-1.0),
    "tokens": lambda header, facts: facts["config"].update(eos=[100]),
    "rope": lambda header, facts: facts["config"]["rope"].update(kind="other"),
    "rope turns": lambda header, facts: facts["config"]["rope"].update(YARN, beta_fast=0.0),
    "rope slow turns": lambda header, facts: facts["config"]["rope"].update(YARN, beta_slow=0.0),
    "rope fast turns": lambda header, facts: facts["config"]["rope"].update(YARN, beta_fast=1e308),
    "rope context": lambda header, facts: facts["config"]["rope"].update(YARN, original_context=1 << 25),
    "rope bands": lambda header, facts: facts["config"]["rope"].update(YARN, kind="llama3", high_freq_factor=1.0),
    "rope factor": lambda header, facts: facts["config"]["rope"].update(attention_factor=0.0),
    "rope base": lambda header, facts: facts["config"]["rope"].update(theta=0.5),
    "family": lambda header, facts: facts["config"].update(family="gpt2"),
    "embedding": lambda header, facts: facts.update(embedding=""),
    "head": lambda header, facts: facts.update(head=True),
    "config": lambda header, facts: facts.pop("config"),
    "facts": lambda header, facts: header["__metadata__"].pop("fedge"),
    "metadata": lambda header, facts: header.pop("__metadata__"),
    "tensor": lambda header, facts: header.pop("embedding"),
    "name": lambda header, facts: header.update(other=header.pop("layers.0.attn.norm")),
    "type": lambda header, facts: header["layers.0.attn.norm"].update(dtype="I32"),
    "shape": lambda header, facts: header["layers.0.attn.norm"].update(shape=[8, 4]),
    "offset": lambda header, facts: header["layers.0.attn.norm"].update(data_offsets=[0, 64]),
    "negative": lambda header, facts: header["layers.0.attn.norm"].update(data_offsets=[-128, 0]),
    "extra": lambda header, facts: header.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
}


@pytest.mark.parametrize(
    "wrong",
    [
        *({"embedding": ""}, {"rank": 1}, {"kind": "int2"}, {"rank": 1, "embedding": "", "head": True}),
        *({"layers": (0, 0)}, {"layers": (0, 3)}, {"layers": (1, 3)}, {"layers": (1, 3), "embedding": ""}),
    ],
)
def test_facts_that_contradict_each_other_are_found(tmp_path, wrong):
    _, (shard, _) = cut(tmp_path, layers=(0, 2))
    assert fault(shard.about) is None
    assert fault(replace(shard.about, **wrong)) is not None


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_header_that_lies_is_refused(raw, tmp_path_factory, change):
    assert refused(tmp_path_factory, with_header(raw, CHANGES[change])) is None


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_damage_is_refused_or_does_no_harm(raw, tmp_path_factory, data):
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 6000))] = data.draw(st.integers(0, 255))
    refused(tmp_path_factory, bytes(damaged))


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_file_that_is_cut_or_longer_is_refused(raw, tmp_path_factory, data):
    longer = raw + data.draw(st.binary(min_size=1, max_size=5000))
    short = raw[: data.draw(st.integers(0, len(raw) - 1))]
    assert refused(tmp_path_factory, longer) is None
    assert refused(tmp_path_factory, short) is None


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=300), st.booleans())
def test_noise_is_refused(tmp_path_factory, noise, paged):
    text = noise + b" " * (-(8 + len(noise)) % PAGE if paged else 0)
    assert refused(tmp_path_factory, len(text).to_bytes(8, "little") + text) is None


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ModelError, match="missing"):
            open_shard(path)
        with pytest.raises(ModelError, match="missing"):
            digest(path)


SMAPS = Path("/proc/self/smaps")


@pytest.mark.skipif(not SMAPS.exists(), reason="only Linux tells how a map is read")
def test_rows_of_the_embedding_are_read_alone_and_blocks_ahead(tmp_path):
    _, shards = cut(tmp_path, vocab=600)
    shard = shards[0]
    ways, here = {}, None  # flags by the bytes of the file
    for line in SMAPS.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, stop = (int(one, 16) for one in words[0].split("-"))
            here = (int(words[2], 16), int(words[2], 16) + stop - start) if words[-1] == str(shard.path) else None
        elif words[0] == "VmFlags:" and here:
            ways[here] = "rr" in words
    end = shard.blocks[-1].offset + shard.blocks[-1].bytes
    size = shard.config.vocab * shard.config.hidden * 4
    assert [ends for ends, alone in ways.items() if alone] == [(end, end + -(-size // PAGE) * PAGE)]
    assert sum(stop - start for (start, stop), alone in ways.items() if not alone) == end
