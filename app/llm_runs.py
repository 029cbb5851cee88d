"""A language model while it runs for a command: served until a signal, or measured.

Must never parse arguments or print.
"""

from collections.abc import Callable
from pathlib import Path

from fedge.edge.llm import http
from fedge.edge.llm.http_server import Server
from fedge.edge.llm.quant import Kind
from fedge.edge.runtime.memory import Resident, resident
from fedge.llm import Engine


def serve(engine: Engine, listen: str, name: str, api_key: str | None, on_listening: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. Raises AddressError where nobody may or can listen there."""
    app = http.app(engine, engine.tokenizer, name, api_key=api_key)
    with Server(app, listen) as server:
        on_listening(f"serving {name} on http://{server.address}/v1")
        server.run()


def bench(
    folder: Path, kind: Kind, ranks: int, memory_bytes: int | None, prompt: int, tokens: int, store: Path | None
) -> dict[str, float]:
    """Times of one greedy request of `prompt` tokens, the second of its kind so that all is warm."""
    context = prompt + tokens
    with Engine(
        folder, ranks=ranks, kind=kind, memory_bytes=memory_bytes, slots=1, context=context, store=store, use_all=True
    ) as engine:
        for turn in range(2):  # another prompt, or it would be found in the cache
            asked = [(3 + turn + 7 * at) % engine.folder.config.vocab for at in range(prompt)]
            handle = engine.generate(asked, max_tokens=tokens)
            for _ in handle:
                pass
        usage, held = handle.usage, resident() or Resident(0, 0)
        workers = engine.group.devices()
    return {
        "ranks": float(1 + len(workers)),
        "ttft_ms": 1e3 * usage.ttft_s,
        "tpot_ms": 1e3 * usage.tpot_s,
        "tokens_per_s": 1 / usage.tpot_s if usage.tpot_s else 0.0,
        "head_private_mb": held.private / 2**20,
        "head_mapped_mb": held.mapped / 2**20,
        "largest_worker_private_mb": max((one.private_bytes for one in workers), default=0) / 2**20,
    }
