"""One other runtime as a process of its own: the same prompt, the same number of greedy tokens, timed the same way.

transformers computes eagerly in inference mode, with its own attention for CPUs; accelerate keeps all layers on the
disk, in the file they come in, where they need no conversion; llama.cpp maps its file. Of several numbers of threads
the one with the least median per token is told. Owns how each is used at its best. Must never import fedge's runtime.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

WARM_TOKENS = 8
Next = Callable[[Sequence[int], int], int]  # tokens from a position on (0: a new text) to the next token


def timed(following: Next, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """A short text first, unmeasured, then the prompt and greedy tokens."""
    warm = prompt[:WARM_TOKENS]
    following(warm, 0)
    following(warm[:1], len(warm))
    begun = time.perf_counter()
    ids = [following(prompt, 0)]
    times = [time.perf_counter()]
    for at in range(len(prompt), len(prompt) + tokens - 1):
        ids.append(following(ids[-1:], at))
        times.append(time.perf_counter())
    seconds = [later - before for before, later in pairwise(times)]
    return {"ttft_s": times[0] - begun, "token_s": seconds, "ids": ids}


def transformers(folder: str, dtype: str, offload: str | None = None) -> Next:
    """`offload` is a folder for what accelerate cannot read from the model's own file."""
    import torch

    from benchmarks.llm_transformers import transformers as library

    more: dict[str, Any] = {}
    if offload is not None:
        layers = library.AutoConfig.from_pretrained(folder).num_hidden_layers
        places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        places |= {f"model.layers.{layer}": "disk" for layer in range(layers)}
        more = {"device_map": places, "offload_folder": offload}
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **more).eval()
    past: list[Any] = [None]

    def following(ids: Sequence[int], at: int) -> int:
        if at == 0:
            past[0] = library.DynamicCache(config=model.config)
        with torch.inference_mode():
            given = torch.tensor([list(ids)])
            found = model(input_ids=given, past_key_values=past[0], use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    return following


def llama_cpp(path: str, threads: int, context: int) -> Next:
    """With the options as they come, which map the file; logits of the last token only."""
    import numpy as np
    from llama_cpp import Llama

    model = Llama(path, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    vocab = model.n_vocab()

    def following(ids: Sequence[int], at: int) -> int:
        if at == 0:
            model.reset()
            model._ctx.kv_cache_clear()
        model.eval(list(ids))
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), shape=(vocab,))
        return int(logits.argmax())

    return following


def best(name: str, path: str, threads: Sequence[int], prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    """The run with the least median per token, over numbers of threads."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        if name == "llama.cpp":
            for count in threads:  # each model is gone before the next one comes
                run = timed(llama_cpp(path, count, len(prompt) + tokens + 1), prompt, tokens)
                found.append(run | {"threads": count})
            return min(found, key=lambda one: median(one["token_s"]))
        import torch

        dtype, _, offload = name.partition("+")
        following = transformers(path, dtype, scratch if offload else None)
        for count in threads:
            torch.set_num_threads(count)
            found.append(timed(following, prompt, tokens) | {"threads": count})
            print(f"{name}, {count} threads: {median(found[-1]['token_s'])} s per token", file=sys.stderr)
    return min(found, key=lambda one: median(one["token_s"]))


def main(name: str, path: str, threads: str, prompt: str, tokens: str) -> None:
    """`name` is float32, bfloat16, float32+disk or llama.cpp; one JSON object goes to the standard output."""
    assert Path(path).exists()
    counts = [int(one) for one in threads.split(",")]
    print(json.dumps(best(name, path, counts, json.loads(prompt), int(tokens))))


if __name__ == "__main__":
    main(*sys.argv[1:])
