"""Folders of models: what is read is what was written; what cannot be computed, or lies, is refused by its name."""

import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fedge.core.errors import DataError, ModelError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.models import config, rope
from fedge.edge.llm.models.folder import EMBEDDING, HEAD, INDEX, NORM, SINGLE, open_folder, promised
from fedge.edge.llm.models.mapped import Mapped, entries
from tests.llm_fixture import folder, stored, write
from tests.llm_reference import logits, rotate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 2.0}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def rewrite(path: Path, **fields: Any) -> None:
    """Change config.json; a value of ... takes the field out."""
    text = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({key: value for key, value in text.items() if value is not ...}))


# ---- What is read ---------------------------------------------------------------------------------------------


def test_single_file_is_read_as_safetensors_itself_reads_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    wanted = load_file(path / SINGLE)
    with open_folder(path) as model:
        assert set(promised(model.config)) == set(wanted)
        for name, array in wanted.items():
            np.testing.assert_array_equal(model.tensor(name), array)
        whole = wanted[QUERY]
        np.testing.assert_array_equal(model.rows(QUERY, 16, 48), whole[16:48])
        np.testing.assert_array_equal(model.embed([7, 0, 7]), wanted[EMBEDDING][[7, 0, 7]])
        assert model.embed([]).shape == (0, 64)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_shards_of_half_numbers_become_the_float32_they_stand_for(tmp_path: Path, dtype: str) -> None:
    exact = load_file(folder(tmp_path / "exact") / SINGLE)
    path = folder(tmp_path / "half", dtype=dtype, shards=3)
    assert len(list(path.glob("*.safetensors"))) == 3
    with open_folder(path) as model:
        for name in promised(model.config):
            bits = stored(exact[name], dtype)
            wide = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits.astype(np.float32)
            np.testing.assert_array_equal(model.tensor(name), wide)
            assert model.dtype(name) == dtype
        np.testing.assert_allclose(model.embed([3]), exact[EMBEDDING][[3]], rtol=2**-8)
        assert model.tensor(NORM).dtype == np.float32


def test_arrays_outlive_the_folder(tmp_path: Path) -> None:
    model = open_folder(folder(tmp_path))
    kept, before = model.tensor(QUERY), model.tensor(QUERY).sum()
    model.close()
    assert kept.sum() == before


def test_digest_tells_models_apart_and_survives_a_copy(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        with open_folder(path) as model:
            return model.digest

    first = folder(tmp_path / "a")
    assert digest(first) == digest(folder(tmp_path / "b"))
    assert digest(first) != digest(folder(tmp_path / "c", seed=1)), "same header, other weights"
    before = digest(first)
    rewrite(first, rms_norm_eps=1e-6)
    assert digest(first) != before


def test_harmless_extra_tensors_are_not_minded(tmp_path: Path) -> None:
    path = folder(tmp_path, tied=True)
    tensors = load_file(path / SINGLE)
    before = logits(path, [1, 5])
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32), HEAD: tensors[EMBEDDING]}
    write(path / SINGLE, tensors | more)
    np.testing.assert_array_equal(logits(path, [1, 5]), before)


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with open_folder(folder(tmp_path)) as model:
        for ids in ([128], [-1], [3, 1 << 40], [1 << 70], [0.5]):
            with pytest.raises(DataError, match="0 to 127"):
                model.embed(ids)


# ---- What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama", {"model_type": "mixtral"}, "model_type 'mixtral'.*llama, mistral, qwen2, qwen3"),
        ("llama", {"model_type": ...}, "model_type"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'.*silu"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*default, linear, llama3, yarn"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "longrope"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor.*missing"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1e-9, "low_freq_factor": 1e-10}}, "rope parameters"),
        ("llama", {"rope_scaling": YARN | {"beta_fast": 0.0}}, "beta_fast"),
        ("llama", {"rope_scaling": YARN | {"beta_slow": 1e-320}}, "rope parameters"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "alike in all layers"),
        ("llama", {"rope_theta": 0.5}, "rope"),
        ("llama", {"num_attention_heads": 3}, "num_key_value_heads 2"),
        ("llama", {"head_dim": 15}, "head_dim 15"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ("llama", {"hidden_size": 0}, "hidden_size"),
        ("llama", {"hidden_size": "64"}, "hidden_size"),
        ("llama", {"eos_token_id": 128}, "eos_token_id"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, "layer_types"),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_its_field(
    family: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    path = folder(tmp_path, family)
    rewrite(path, **fields)
    with pytest.raises(ModelError, match=named):
        open_folder(path)


def test_an_end_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 128]}')
    with pytest.raises(ModelError, match=r"generation_config\.json.*below vocab_size 128"):
        open_folder(path)


def test_windows_and_ends_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    path = folder(tmp_path, "mistral", sliding_window=16)
    assert config.read(path).window == 16
    for other in (None, 256, 4096, ...):  # none; as long as the context or longer; missing means 4096
        rewrite(path, sliding_window=other)
        assert config.read(path).window == 0
    rewrite(path, model_type="qwen2", sliding_window=16, use_sliding_window=False, max_window_layers=0)
    assert config.read(path).window == 0
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert config.read(path).eos == (2, 9)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(QUERY), "lacks 'model.layers.1.self_attn.q_proj.weight'"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)[:5]], "and 2 more"),
        (lambda tensors: tensors.update({QUERY[:-6] + "bias": np.zeros(64, np.float32)}), "holds .*q_proj.bias"),
        (lambda tensors: tensors.update({QUERY: tensors[QUERY][:8]}), "another shape"),
    ],
)
def test_files_that_break_the_promise_of_the_config_are_refused(change: Any, named: str, tmp_path: Path) -> None:
    path = folder(tmp_path)
    tensors = dict(load_file(path / SINGLE))
    change(tensors)
    write(path / SINGLE, tensors)
    with pytest.raises(ModelError, match=named):
        open_folder(path)


def test_other_number_types_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path)
    data = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ModelError, match="stored as I32.*bfloat16"):
        open_folder(path)


@pytest.mark.parametrize(
    "name", ["../model-00001.safetensors", "/etc/passwd", "a\\b.safetensors", "model.bin", "\0.safetensors"]
)
def test_an_index_may_not_name_files_outside_the_folder(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path, shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][QUERY] = name
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside the folder"):
        open_folder(path)


def test_a_tensor_in_two_shards_and_a_missing_shard_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path, shards=2)
    first, second = sorted(path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="in two files"):
        open_folder(path)
    second.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="fetch"):
        open_folder(path)
    second.unlink()
    with pytest.raises(ModelError, match="missing"):
        open_folder(path)


def test_no_folder_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        open_folder(tmp_path / "nowhere")
    path = folder(tmp_path)
    (path / SINGLE).unlink()
    os.mkfifo(path / SINGLE)
    with pytest.raises(ModelError, match="no file"):
        open_folder(path)


# ---- Headers from strangers -----------------------------------------------------------------------------------


def header(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


@pytest.mark.parametrize(
    "text",
    [
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),  # ends before the file
        header(a={"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}),  # beyond the file
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}),  # a hole
        header(a={"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}),  # a shape of other size
        header(a={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}),
        header(a={"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 16]}),
        header(a={"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}),
        header(a={"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}),
        header(
            a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            b={"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        ),
        header(a=3),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        b"",
    ],
)
def test_hostile_headers_are_refused(text: bytes) -> None:
    with pytest.raises(ModelError):
        entries(text, 16)
    assert entries(header(a={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), 16)["a"].shape == (4,)


OFFSET = st.one_of(st.integers(-1, 40), st.integers(), st.floats(), st.none())
TENSOR = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F16", "I8", "", 3])},
    optional={"shape": st.lists(OFFSET, max_size=3), "data_offsets": st.lists(OFFSET, min_size=1, max_size=3)},
)
HEADER = st.one_of(
    st.binary(max_size=64),
    st.dictionaries(st.text(max_size=3), TENSOR, max_size=3).map(lambda found: json.dumps(found).encode()),
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A true file of up to three tensors, of which one byte may then be another."""
    found, at = {}, 0
    for name in draw(st.lists(st.text(max_size=3), unique=True, max_size=3)):
        dtype, width = draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2), ("I64", 8)]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = at + width * int(np.prod(shape))
        found[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(found).encode()
    whole = bytearray(struct.pack("<Q", len(text)) + text + draw(st.binary(min_size=at, max_size=at)))
    if draw(st.booleans()):
        whole[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    return bytes(whole)


def framed(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@settings(max_examples=200, deadline=None)
@given(whole=st.one_of(files(), st.builds(framed, HEADER, st.binary(max_size=40))))
def test_any_file_is_read_within_its_bounds_or_refused(whole: bytes) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "a.safetensors"
        path.write_bytes(whole)
        try:
            found = Mapped(path)
        except ModelError:
            return
        data = whole[8 + int.from_bytes(whole[:8], "little") :]
        assert sum(entry.data_offsets[1] - entry.data_offsets[0] for entry in found.entries.values()) == len(data)
        for name, entry in found.entries.items():
            begin, end = entry.data_offsets
            assert found.sample(name, 99) == data[(begin + end) // 2 : end][:99]
            found.forget(name)
            if entry.dtype in ("F32", "F16", "BF16"):
                assert found.view(name).tobytes() == data[begin:end]
        found.close()


@settings(max_examples=50, deadline=None)
@given(whole=files(), at=st.integers(0, 400))
def test_a_file_cut_short_is_refused(whole: bytes, at: int) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "a.safetensors"
        path.write_bytes(whole)
        try:
            Mapped(path).close()
        except ModelError:
            return  # the byte that is another
        path.write_bytes(whole[: min(at, len(whole) - 1)])
        with pytest.raises(ModelError):
            Mapped(path)


def test_a_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(ModelError, match="100 bytes"):
        open_folder(path, LlmLimits(max_header_bytes=100))
    with pytest.raises(ModelError, match="larger than 10"):
        config.read(path, LlmLimits(max_config_bytes=10))


# ---- Positions ------------------------------------------------------------------------------------------------


@given(position=st.integers(0, 5000), shift=st.integers(0, 5000), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_what_a_query_sees_depends_on_the_distance_only(position: int, shift: int, seed: int) -> None:
    model = config.Config("llama", 1, 32, 32, 2, 1, 16, 8, 9999, 1e-5, config.Rope(), *[False] * 5, 0, None, ())
    q, k = np.random.default_rng(seed).standard_normal((2, 1, 2, 16)).astype(np.float32)

    def score(at: int, of: int) -> Any:
        return (rotate(q, *rope.tables(model, np.array([at]))) * rotate(k, *rope.tables(model, np.array([of])))).sum()

    np.testing.assert_allclose(score(position + 7, position), score(position + shift + 7, position + shift), atol=0.05)
    np.testing.assert_allclose(score(position, position), (q * k).sum(), atol=1e-4)


def test_a_window_hides_what_lies_before_it(tmp_path: Path) -> None:
    path = folder(tmp_path, "mistral", layers=1, sliding_window=4)
    ids = np.arange(3, 13)
    changed = ids.copy()
    changed[5] = 99
    differs = np.abs(logits(path, ids) - logits(path, changed)).max(axis=1) > 1e-6
    assert differs.tolist() == [False] * 5 + [True] * 4 + [False]
