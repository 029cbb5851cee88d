"""The models of the language benchmark: random weights of real shapes, in every form that a runtime wants.

Everything is made once and kept in a cache: a folder of safetensors in bfloat16 and one in float32 (of the same
numbers), shards by kind and number of ranks, and GGUF files. Run as a module it makes one of them, so that the memory
this takes is not the benchmark's. Owns the cache. Must never measure.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.llm.models import mapped
from fedge.edge.llm.models.config import read
from fedge.edge.llm.models.folder import open_folder, promised
from fedge.edge.llm.shards import about, export, layout, quant, shares
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.llm.shards.shard import open_shard

CACHE = Path.home() / ".cache/fedge-data"
WEIGHTS = "model.safetensors"
BYTES = {"BF16": 2, "F32": 4}
_SEED = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a model of the Llama family; the head is not the embedding."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int = 2048


LARGE = Shape("llm-1100m", 22, 2048, 32, 4, 5632, 32000)  # TinyLlama (arXiv 2401.02385)
MIDDLE = Shape("llm-340m", 12, 1536, 24, 4, 4096, 32000)
TINY = Shape("llm-tiny", 2, 256, 8, 4, 512, 512)
SHAPES = {shape.name: shape for shape in (LARGE, MIDDLE, TINY)}


def folder(shape: Shape, dtype: str = "BF16", cache: Path = CACHE) -> Path:
    """Hugging Face's form, without a tokenizer."""
    path = cache / f"{shape.name}-{dtype.lower()}"
    if not (path / "config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        fields = _fields(shape, {"BF16": "bfloat16", "F32": "float32"}[dtype])
        (path / "config.tmp").write_text(json.dumps(fields))
        (path / "config.json").write_text(json.dumps(fields))
        promise = promised(read(path))
        (path / "config.json").unlink()
        _write(path / WEIGHTS, dtype, _tensors(shape, promise), promise)
        (path / "config.tmp").rename(path / "config.json")  # last: now the folder is whole
    return path


def shards(shape: Shape, kind: Kind, ranks: int, cache: Path = CACHE, *, by_bytes: bool = False) -> list[Path]:
    """One file per rank; made again where the code that makes them has changed.

    Shares are those of devices of one speed, or, `by_bytes`, of devices that lack memory.
    """
    out = cache / (f"{shape.name}-shards" + ("-by-bytes" if by_bytes else ""))
    stamp = out / f"{kind}-{ranks}.stamp"
    paths = [out / f"rank-{rank}-of-{ranks}.{kind}.safetensors" for rank in range(ranks)]
    if not (stamp.exists() and stamp.read_text() == _code() and _usable(paths)):
        out.mkdir(parents=True, exist_ok=True)
        with open_folder(folder(shape, cache=cache)) as whole:
            held = shares.even(whole.config, ranks)
            if by_bytes:
                held = shares.proportional(whole.config, [1.0] * ranks, shares.cost_of_head(kind))
            made = export.export(whole, out, held, kind)
        assert made == paths, made
        stamp.write_text(_code())
    return paths


def gguf(shape: Shape, name: str, cache: Path = CACHE) -> Path:
    """The file of llama.cpp, every matrix as `name`: "Q8_0" or "Q4_0"."""
    path = cache / f"{shape.name}-{name.lower()}.gguf"
    if not path.exists():
        _convert(shape, name, folder(shape, cache=cache), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    return path


def made(shape: Shape, what: str, *more: str, cache: Path = CACHE) -> list[Path]:
    """Paths of "folder", "shards" or "gguf" with their arguments, made by a process of its own where need be."""
    command = [sys.executable, "-m", __name__, str(cache), shape.name, what, *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Path(line) for line in json.loads(done.stdout.splitlines()[-1])]


def forget(paths: Sequence[Path]) -> None:
    """Let the system's cache have none of these files' pages, so that who reads them next is charged for them."""
    for path in paths:
        for file in path.iterdir() if path.is_dir() else [path]:
            handle = os.open(file, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _fields(shape: Shape, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


def _tensors(shape: Shape, promise: dict[str, tuple[int, ...]]) -> Iterator[Array]:
    """Weights that bfloat16 holds exactly, as float32; of a size that keeps every layer's output near one."""
    random = np.random.default_rng(_SEED)
    for name, size in promise.items():
        noise = random.standard_normal(size, np.float32)
        if len(size) == 1:
            noise /= 8
            noise += 1
        else:
            noise *= np.float32(size[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                noise *= np.float32((2 * shape.layers) ** -0.5)
        bits = noise.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)
        bits &= 0xFFFF0000
        yield noise


def _write(path: Path, dtype: str, tensors: Iterator[Array], promise: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file, a tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, size in promise.items():
        end = at + BYTES[dtype] * int(np.prod(size))
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            stored = (tensor.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else tensor
            file.write(stored.data)


def _usable(paths: Sequence[Path]) -> bool:
    try:
        return all(open_shard(path).path == path for path in paths)
    except ModelError:
        return False


def _code() -> str:
    """What the bytes of a shard follow from."""
    found = hashlib.sha256()
    for module in (about, export, layout, mapped, quant, shares):
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()


def _convert(shape: Shape, name: str, source: Path, path: Path) -> None:
    import gguf as library
    from gguf import quants

    kind = library.GGMLQuantizationType[name]
    writer = library.GGUFWriter(path, "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(library.LlamaFileType[f"MOSTLY_{name}"])
    writer.add_tokenizer_model("no_vocab")  # tokens are given as numbers
    with open_folder(source) as whole:
        for theirs, ours in _names(shape.layers):
            tensor = whole.tensor(ours)
            if ours.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = _paired(tensor, shape.hidden // shape.heads)
            if tensor.ndim == 1:
                writer.add_tensor(theirs, np.array(tensor, np.float32))
            else:
                writer.add_tensor(theirs, quants.quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _paired(weight: Array, head_dim: int) -> Array:
    """Rows in the order in which llama.cpp turns them: number i next to number i + head_dim / 2."""
    rows, columns = weight.shape
    return weight.reshape(rows // head_dim, 2, head_dim // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _names(layers: int) -> Iterator[tuple[str, str]]:
    yield "token_embd.weight", "model.embed_tokens.weight"
    inside = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(layers):
        for theirs, ours in inside.items():
            yield f"blk.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight"
    yield "output_norm.weight", "model.norm.weight"
    yield "output.weight", "lm_head.weight"


def main(cache: str, name: str, what: str, *more: str) -> None:
    """The child: paths go to the standard output."""
    shape, where = SHAPES[name], Path(cache)
    if shutil.disk_usage(where).free < 24 * shape.layers * shape.hidden * shape.ffn:
        raise SystemExit(f"There is too little room in {where} for the models of this benchmark.")
    if what == "folder":
        paths = [folder(shape, more[0], where)]
    elif what == "shards":
        paths = shards(shape, cast("Kind", more[0]), int(more[1]), where, by_bytes=more[2:] == ("by-bytes",))
    else:
        paths = [gguf(shape, more[0], where)]
    print(json.dumps([str(path) for path in paths]))


if __name__ == "__main__":
    main(*sys.argv[1:])
