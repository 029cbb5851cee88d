"""The whole model in plain NumPy, the whole text at once, nothing kept: slow, obvious, what fast paths must equal."""

from pathlib import Path

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.models import rope
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.models.folder import EMBEDDING, HEAD, NORM, Folder, open_folder
from fedge.edge.llm.shards.quant import Matrix


def logits(model: Path | Folder, ids: list[int] | Array) -> Array:
    """float32 [n, vocab]: what follows each of the n tokens."""
    if isinstance(model, Path):
        with open_folder(model) as opened:
            return logits(opened, ids)
    config = model.config
    x = model.embed(ids)
    for layer in range(config.layers):
        name = f"model.layers.{layer}."
        x = x + attention(
            model, name + "self_attn.", norm(x, model.tensor(name + "input_layernorm.weight"), config.eps)
        )
        x = x + ffn(model, name + "mlp.", norm(x, model.tensor(name + "post_attention_layernorm.weight"), config.eps))
    return norm(x, model.tensor(NORM), config.eps) @ model.tensor(EMBEDDING if config.tied else HEAD).T


def norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def linear(model: Folder, name: str, x: Array, bias: bool) -> Array:
    y = x @ model.tensor(name + ".weight").T
    return y + model.tensor(name + ".bias") if bias else y


def attention(model: Folder, name: str, x: Array) -> Array:
    config, n = model.config, len(x)
    q = linear(model, name + "q_proj", x, config.qkv_bias).reshape(n, config.heads, config.head_dim)
    k = linear(model, name + "k_proj", x, config.qkv_bias).reshape(n, config.kv_heads, config.head_dim)
    v = linear(model, name + "v_proj", x, config.qkv_bias).reshape(n, config.kv_heads, config.head_dim)
    if config.qk_norm:
        q = norm(q, model.tensor(name + "q_norm.weight"), config.eps)
        k = norm(k, model.tensor(name + "k_norm.weight"), config.eps)
    cos, sin = rope.tables(config, np.arange(n))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out = np.empty_like(q)
    for head in range(config.heads):
        group = head // config.group
        scores = q[:, head] @ k[:, group].T / np.float32(np.sqrt(config.head_dim))
        scores[~visible(config, n)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, group]
    return linear(model, name + "o_proj", out.reshape(n, -1), config.o_bias)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """All heads of x [n, heads, head_dim] turned. A pair is one number of each half of the head, as Hugging Face stores
    queries and keys (not neighbours, as in RoFormer).
    """
    first, second = np.split(x, 2, axis=-1)
    c, s = cos[:, None, :], sin[:, None, :]
    return np.concatenate((first * c - second * s, second * c + first * s), axis=-1)


def visible(config: Config, n: int) -> Array:
    """bool [n, n]: whether a query (row) sees a key (column)."""
    back = np.arange(n)[:, None] - np.arange(n)[None, :]
    return (back >= 0) & (back < (config.window or n))


def ffn(model: Folder, name: str, x: Array) -> Array:
    bias = model.config.ffn_bias
    gate = linear(model, name + "gate_proj", x, bias)
    return linear(
        model, name + "down_proj", gate / (1 + np.exp(-gate)) * linear(model, name + "up_proj", x, bias), bias
    )


def greedy(model: Path | Folder, ids: list[int], count: int) -> list[int]:
    """`count` tokens that follow, each the likeliest."""
    text = list(ids)
    for _ in range(count):
        text.append(int(logits(model, text)[-1].argmax()))
    return text[len(ids) :]


def dequantise(matrix: Matrix) -> Array:
    """The weights of a rounded matrix, as `Matrix` says that they lie: float32 [rows, columns], a new array."""
    if matrix.kind == "float32":
        return matrix.data.astype(np.float32)
    if matrix.kind == "int8":
        return np.asarray(matrix.data.astype(np.float32) * matrix.scale[:, None])
    levels = np.stack([matrix.data & 15, matrix.data >> 4], axis=-1).astype(np.float32) - 8
    blocks = levels.reshape(*matrix.scale.shape, 32) * matrix.scale[:, :, None]
    return np.ascontiguousarray(blocks.reshape(matrix.rows, matrix.scale.shape[1] * 32)[:, : matrix.columns])
