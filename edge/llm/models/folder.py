"""A model's folder as Hugging Face lays it out: config.json and safetensors, one file or shards with an index.

Owns the names and shapes that a Config promises, and the check that the files keep the promise. Everything is read
through maps, so that a model larger than memory can be cut. Must never compute, quantise, nor write.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from fedge.core.errors import DataError, ModelError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.models.config import Config, read
from fedge.edge.llm.models.mapped import Mapped, widen

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_SAMPLE_BYTES = 1024  # of each tensor, in the digest


class Folder:
    """An open folder. All arrays are new, float32 and C-contiguous; only what is asked for is read."""

    def __init__(self, config: Config, files: tuple[Mapped, ...]) -> None:
        self.config = config
        self._files = files
        self._where = {name: file for file in files for name in file.entries}
        self.digest = _digest(config, files)

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def dtype(self, name: str) -> str:
        """How a tensor is stored: F32, F16 or BF16."""
        return self._where[name].entries[name].dtype

    def tensor(self, name: str) -> Array:
        """A whole tensor."""
        return self._copy(name, slice(None))

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop`, exclusive, of a matrix, or numbers of a vector."""
        return self._copy(name, slice(start, stop))

    def embed(self, ids: Array | list[int]) -> Array:
        """The rows [n, hidden] of the embedding for token ids [n]. Raises DataError at an id outside the vocabulary."""
        wanted = np.asarray(ids)
        if wanted.size and (wanted.dtype.kind not in "iu" or not 0 <= wanted.min() <= wanted.max() < self.config.vocab):
            raise DataError(f"A token id lies outside 0 to {self.config.vocab - 1}; use the model's own tokenizer.")
        return widen(self._where[EMBEDDING].view(EMBEDDING)[wanted.astype(np.int64)])

    def close(self) -> None:
        """Unmap the files."""
        for file in self._files:
            file.close()

    def _copy(self, name: str, part: slice) -> Array:
        file = self._where[name]
        copy = widen(file.view(name)[part])
        file.forget(name)
        return copy


def open_folder(path: Path, limits: LlmLimits = LlmLimits()) -> Folder:
    """Open a folder and check that its files hold the tensors its config promises. Raises ModelError."""
    config = read(path, limits)
    files: list[Mapped] = []
    try:
        for name in _file_names(path, limits):
            files.append(Mapped(path / name, limits))  # noqa: PERF401 (those that are open are closed on an error)
        _check(path, config, files)
        return Folder(config, tuple(files))
    except BaseException:
        for file in files:
            file.close()
        raise


def promised(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, in the order of computing."""
    table = (config.vocab, config.hidden)
    found: dict[str, tuple[int, ...]] = {EMBEDDING: table}
    for layer in range(config.layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config)}
    return found | {NORM: (config.hidden,)} | ({} if config.tied else {HEAD: table})


def _layer(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    hidden, ffn = config.hidden, config.ffn
    yield "input_layernorm.weight", (hidden,)
    sizes = (
        ("q_proj", queries, hidden),
        ("k_proj", keys, hidden),
        ("v_proj", keys, hidden),
        ("o_proj", hidden, queries),
    )
    for name, rows, columns in sizes:
        yield f"self_attn.{name}.weight", (rows, columns)
        if config.o_bias if name == "o_proj" else config.qkv_bias:
            yield f"self_attn.{name}.bias", (rows,)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)
    for name, rows, columns in (("gate_proj", ffn, hidden), ("up_proj", ffn, hidden), ("down_proj", hidden, ffn)):
        yield f"mlp.{name}.weight", (rows, columns)
        if config.ffn_bias:
            yield f"mlp.{name}.bias", (rows,)


class _Index(msgspec.Struct, frozen=True):
    weight_map: Annotated[dict[str, str], msgspec.Meta(min_length=1)]


def _file_names(path: Path, limits: LlmLimits) -> list[str]:
    """The safetensors files of the folder. An index may name plain files of the folder only."""
    index = path / INDEX
    if (path / SINGLE).exists() or not index.exists():
        return [SINGLE]
    try:
        if not index.is_file() or index.stat().st_size > limits.max_header_bytes:
            raise ModelError(f"{index} is no file, or above {limits.max_header_bytes} bytes; fetch it again.")
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{index} cannot be used ({error!s:.200}); fetch it again.") from error
    plain = all(name.endswith(".safetensors") and not set(name) & set("/\\\0") for name in names)
    if not plain or len(names) > limits.max_files:
        raise ModelError(f"{index} names more than {limits.max_files} files or one outside the folder; fetch it again.")
    return names


def _check(path: Path, config: Config, files: list[Mapped]) -> None:
    """The files hold what the config promises, each tensor once, and nothing that would change the result."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        twice = found.keys() & file.entries.keys()
        if twice:
            raise ModelError(f"{path} holds {_few(twice)} in two files; fetch it again.")
        found |= {name: entry.shape for name, entry in file.entries.items()}
    wanted = promised(config)
    missing = wanted.keys() - found.keys()
    if missing:
        raise ModelError(f"{path} lacks {_few(missing)}, which its config.json promises; fetch it again.")
    extra = [name for name in found.keys() - wanted.keys() if not _harmless(name, config)]
    if extra:
        raise ModelError(f"{path} holds {_few(extra)}, which fedge would not use; choose another model.")
    wrong = [name for name, shape in wanted.items() if found[name] != shape]
    if wrong:
        raise ModelError(f"{path} holds {_few(wrong)} in another shape than its config.json says; fetch it again.")
    for file in files:
        for name in file.entries.keys() & wanted.keys():
            file.view(name)  # refuses other types


def _harmless(name: str, config: Config) -> bool:
    """Tensors that old files hold though they follow from others."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied and name == HEAD)


def _few(names: Iterable[str]) -> str:
    """The first three of the names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(f"{name!r:.100}" for name in ordered[:3]) + more


def _digest(config: Config, files: tuple[Mapped, ...]) -> str:
    """SHA-256 over the config, the headers, and some bytes of every tensor: two fine-tuned copies of one model differ
    in nothing else. It tells models apart; it does not prove that a file is whole.
    """
    digest = hashlib.sha256(repr(config).encode())
    for file in files:
        digest.update(len(file.header).to_bytes(8, "little") + file.header)
        for name in sorted(file.entries):
            digest.update(file.sample(name, _SAMPLE_BYTES))
    return digest.hexdigest()
