"""Real small models over 1 to 4 ranks against transformers: the same tokens, and how far logits are off.

A real group each time: processes, sockets, shards cut for it; all in float32. One more row exchanges the sums of
several tokens in 8 bits, which shows what that costs in exactness. Other rows round weights, and x as each kernel does,
over a piece of a book read at once. Owns the comparison. Must never measure time.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import Goal, goal
from benchmarks.llm_models import CACHE
from fedge.core.params import Array
from fedge.edge.llm.compute.kernels import KERNELS, Kernel
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.group.division import everyone
from fedge.edge.llm.group.local import local
from fedge.edge.llm.mesh.collectives import INT8_SUMS
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.folder import Folder, open_folder
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.export import export
from fedge.edge.llm.shards.shard import open_shard
from fedge.edge.llm.shards.shares import even

PART = "real"
MODELS = ("stories15m", "smollm2-135m")
TEXT = "Once upon a time there was a small fox who lived at the edge of a forest. One morning"
TOKENS, CONTEXT, FORM_S = 40, 128, 120.0
MEMORY_BYTES = 1 << 30
OFF = 100  # millionths of the largest logit
BOOK, BOOK_AT, BOOK_TOKENS = "gutenberg.txt", 20_000, 400
CASES: tuple[tuple[int, str | None], ...] = ((1, None), (2, None), (3, None), (4, None), (4, INT8_SUMS))


def measure(cache: Path = CACHE) -> list[dict[str, Any]]:
    """A row per model and case."""
    return [row for name in MODELS for row in (*_model(cache / name), *_rounded(cache / name, cache / BOOK))]


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """That exact exchanges give transformers' answers; nothing was asked of 8 bits."""
    exact = [row for row in rows if row["part"] == PART and row.get("exchange") == "exact"]
    same = min((row["same"] for row in exact), default=None)
    off = max((1e6 * row["logits_off"] for row in exact), default=None)
    return [
        goal(f"real models, 1 to 4 ranks: tokens of {TOKENS} that are transformers', least", same, f">= {TOKENS}"),
        goal("real models, 1 to 4 ranks: logits off, millionths of the largest", off, f"<= {OFF}"),
    ]


def _model(path: Path) -> list[dict[str, Any]]:
    if not (path / "config.json").is_file():
        return [{"part": PART, "weights": path.name, "note": f"missing: {path.name} in the cache"}]
    prompt = tuple(Tokenizer(path).encode(TEXT))
    expected, ids = _transformers(path, prompt)
    rows = []
    with open_folder(path) as folder, TemporaryDirectory(prefix="fedge-real-") as scratch:
        for ranks, exchange in CASES:
            logits, found = _fedge(folder, ranks, exchange, prompt, Path(scratch))
            row = {
                "part": PART,
                "runtime": "fedge",
                "weights": path.name,
                "ranks": ranks,
                "exchange": exchange or "exact",
                "same": sum(one == other for one, other in zip(found, ids)),
                "logits_off": float(np.abs(logits - expected).max() / np.abs(expected).max()),
            }
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _rounded(path: Path, book: Path) -> list[dict[str, Any]]:
    """How far each kernel's next tokens are from those of float32, as `off_nats` (Kullback-Leibler) and `same_pct`."""
    if not (path / "config.json").is_file() or not book.is_file():
        return [{"part": PART, "weights": path.name, "note": f"missing: {path.name} or {BOOK} in the cache"}]
    ids = Tokenizer(path).encode(book.read_text()[BOOK_AT:][: 8 * BOOK_TOKENS])[:BOOK_TOKENS]
    rows: list[dict[str, Any]] = []
    with open_folder(path) as folder, TemporaryDirectory(prefix="fedge-real-") as scratch:
        exact = _log_chances(folder, KERNELS["numpy-float32"], ids, Path(scratch))
        for kernel in KERNELS.values():
            if kernel.kind == "float32" or not kernel.available():
                continue
            found = _log_chances(folder, kernel, ids, Path(scratch))
            row = {
                "part": PART,
                "runtime": "fedge",
                "weights": f"{path.name} {kernel.kind}",
                "kernel": kernel.name,
                "off_nats": float((np.exp(exact) * (exact - found)).sum(1).mean()),
                "same_pct": float(100 * (exact.argmax(1) == found.argmax(1)).mean()),
                "perplexity_ratio": float(np.exp(_nats(found, ids) - _nats(exact, ids))),
            }
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _log_chances(folder: Folder, kernel: Kernel, ids: Sequence[int], scratch: Path) -> Array:
    """Of every next token, [tokens, vocab], by one rank that reads them at once."""
    shard = open_shard(export(folder, scratch, even(folder.config, 1), kernel.kind)[0])
    with contextlib.closing(Model(shard, Resident(shard, kernel), Alone(), slots=1, context=len(ids))) as model:
        logits = model.run(Step((Part(0, 0, len(ids)),)), np.array(ids), np.arange(len(ids))).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return logits


def _nats(log_chances: Array, ids: Sequence[int]) -> float:
    """Of the text, per token."""
    return -float(log_chances[np.arange(len(ids) - 1), ids[1:]].mean())


def _fedge(
    folder: Folder, ranks: int, exchange: str | None, prompt: Sequence[int], store: Path
) -> tuple[Array, list[int]]:
    """Logits of the whole prompt [tokens, vocab], and the tokens after it."""
    with local(
        folder,
        ranks,
        kind="float32",
        store=store,
        memory_bytes=MEMORY_BYTES,
        kernel="numpy-float32",
        slots=1,
        context=CONTEXT,
        collective=exchange,
        divide=everyone,
    ) as group:
        model: Model = group.form(FORM_S)
        every = np.arange(len(prompt))
        logits = model.run(Step((Part(0, 0, len(prompt)),)), np.array(prompt), every)
        ids = [int(logits[-1].argmax())]
        for at in range(len(prompt), len(prompt) + TOKENS - 1):
            ids.append(int(model.run(Step((Part(0, at, 1),)), np.array(ids[-1:]))[0].argmax()))
    return logits, ids


def _transformers(path: Path, prompt: Sequence[int]) -> tuple[Array, list[int]]:
    import torch

    from benchmarks.llm_transformers import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    past = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        found: Array = model(torch.tensor([list(prompt)]), past_key_values=past, use_cache=True).logits[0].numpy()
        ids = [int(found[-1].argmax())]
        for _ in range(TOKENS - 1):
            last = model(torch.tensor([ids[-1:]]), past_key_values=past, use_cache=True).logits[0, -1]
            ids.append(int(last.argmax()))
    return found, ids
