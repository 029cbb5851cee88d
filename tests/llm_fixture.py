"""Folders of small models with random weights, in Hugging Face's form, made without transformers or torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fedge.core.params import Array
from fedge.edge.llm.models.config import read
from fedge.edge.llm.models.folder import INDEX, SINGLE, promised

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def folder(
    tmp: Path,
    family: str = "llama",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    vocab: int = 128,
    tied: bool = False,
    *,
    context: int = 256,
    dtype: str = "F32",
    shards: int = 1,
    seed: int = 0,
    template: str | None = TEMPLATE,
    **more: Any,
) -> Path:
    """A folder below `tmp` with config, weights (F32, F16 or BF16) and tokenizer; `more` are fields of config.json."""
    path = Path(tmp) / f"{family}-{seed}"
    path.mkdir(parents=True, exist_ok=True)
    fields = {
        "architectures": [f"{ARCHITECTURES[family]}ForCausalLM"],
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (path / "config.json").write_text(json.dumps(fields | more))
    random = np.random.default_rng(seed)
    tensors = {name: _weights(random, name, shape) for name, shape in promised(read(path)).items()}
    names = sorted(tensors)
    if shards == 1:
        write(path / SINGLE, tensors, dtype)
    else:
        files = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
        for file in set(files.values()):
            write(path / file, {name: tensors[name] for name in names if files[name] == file}, dtype)
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    tokenizer(path, vocab, template)
    return path


def _weights(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """Large enough that every part of the model shows in the logits, small enough that nothing saturates."""
    noise = random.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + noise / 8
    return noise / np.float32(4 if len(shape) == 1 else shape[1] ** 0.5)


def write(path: Path, tensors: dict[str, Array], dtype: str = "F32") -> None:
    """A safetensors file of float32 arrays, stored as F32, F16 or BF16 (rounded to nearest)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, array in tensors.items():
        blob = stored(array, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def stored(array: Array, dtype: str) -> Array:
    """The array as the file holds it; bfloat16 as uint16."""
    if dtype == "BF16":
        bits = array.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return array.astype({"F32": "<f4", "F16": "<f2"}[dtype])


def tokenizer(path: Path, vocab: int, template: str | None = TEMPLATE) -> None:
    """tokenizer.json and tokenizer_config.json. With 300 tokens or more every text has an encoding (byte-level BPE);
    with fewer, text of printable ASCII. Ids 0 to 2 are <unk>, <s> and </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab < 300:
        printable = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("".join(map(chr, range(32, 127))))
        letters = sorted(set("".join(piece for piece, _ in printable)))
    pairs = [(a, b) for a in "Ġetaoinsh" for b in "etaoinshrdlu"]
    special = ["<unk>", "<s>", "</s>"]
    merges = pairs[: max(0, vocab - len(special) - len(letters))]
    pieces = [*special, *letters, *(a + b for a, b in merges)]
    pieces += [f"w{at}" for at in range(len(pieces), vocab)]  # reachable by sampling only
    table = {piece: at for at, piece in enumerate(pieces[:vocab])}
    built = Tokenizer(
        models.BPE(vocab=table, merges=[pair for pair in merges if "".join(pair) in table], unk_token="<unk>")  # noqa: S106
    )
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    built.save(str(path / "tokenizer.json"))
    fields = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template is not None:
        fields["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
