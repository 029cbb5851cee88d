"""A language model while it works for a command: served until a signal, measured, trained, or with a cloud behind it.

Must never parse arguments or print.
"""

import contextlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import msgspec

from fedge.core.errors import ModelError
from fedge.edge.llm.api import http
from fedge.edge.llm.api.http_server import Server
from fedge.edge.llm.collab import device as collab_device
from fedge.edge.llm.collab import halves
from fedge.edge.llm.collab.decoder import Decoder, Settings, Summary, Token
from fedge.edge.llm.collab.engine import Engine as CollabEngine
from fedge.edge.llm.engine import engine as engines
from fedge.edge.llm.engine.handle import Handle
from fedge.edge.llm.engine.requests import Piece, Request, Usage
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.group.division import everyone
from fedge.edge.llm.group.local import local
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.runtime.memory import Resident, resident
from fedge.llm import COME_S, context_for, default_store

# What a tokenizer needs of a model's folder; the device's half takes copies of those there are.
TOKENIZER = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class Served(Protocol):
    """What can be served: an engine with its tokenizer."""

    tokenizer: Tokenizer

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Handle:
        """As fedge.edge.llm.engine.engine's."""

    def requests(self) -> tuple[int, int]:
        """How many run, and how many wait."""

    def stats(self) -> dict[str, float]:
        """Figures."""


@contextlib.contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """SIGTERM ends in order what runs in here, also while it starts: as Ctrl-C does, but the exit code is 0."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def serve(engine: Served, listen: str, name: str, api_key: str | None, on_listening: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. Raises AddressError where nobody may or can listen there."""
    app = http.app(engine, engine.tokenizer, name, api_key=api_key)
    with Server(app, listen) as server:
        on_listening(f"serving {name} on http://{server.address}/v1")
        server.run()


def bench(
    folder: Path, kind: Kind, ranks: int, memory_bytes: int | None, prompt: int, tokens: int, store: Path | None
) -> dict[str, float]:
    """Times of one greedy request of `prompt` tokens, the second of its kind so that all is warm: `tokens` passes, as
    nothing is guessed ahead and no token ends the answer. Raises ExperimentError where the model's context is shorter,
    ModelError where it fails.
    """
    context = prompt + tokens
    settings: dict[str, Any] = {"kind": kind, "store": store or default_store(), "memory_bytes": memory_bytes}
    settings |= {"slots": 1, "divide": everyone}
    with (
        open_folder(folder) as opened,
        local(opened, ranks, context=context_for(context, opened.config), **settings) as group,
    ):
        vocab, model = opened.config.vocab, group.form(COME_S)
        with contextlib.closing(
            engines.Engine(model, vocab=vocab, slots=1, context=context, speculate=False)
        ) as engine:
            for turn in range(2):  # another prompt, or it would be found in the cache
                asked = tuple((3 + turn + 7 * at) % vocab for at in range(prompt))
                usage = _answered(engine.submit(Request(asked, tokens, Sampling(temperature=0.0), stop_tokens=())))
        held, workers = resident() or Resident(0, 0), group.devices()
    return {
        "ranks": float(1 + len(workers)),
        "ttft_ms": 1e3 * usage.ttft_s,
        "tpot_ms": 1e3 * usage.tpot_s,
        "tokens_per_s": 1 / usage.tpot_s if usage.tpot_s else 0.0,
        "head_private_mb": held.private / 2**20,
        "head_mapped_mb": held.mapped / 2**20,
        "largest_worker_private_mb": max((one.private_bytes for one in workers), default=0) / 2**20,
    }


def _answered(handle: Handle) -> Usage:
    """What a request has cost, once it has ended. Raises ModelError where it failed."""
    *_, last = handle
    if last.finish == "error":
        raise ModelError(last.error)
    return handle.usage


def train_exits(
    model: Path,
    layers: Sequence[int],
    folder: Path,
    *,
    text: str,
    generate: int,
    seconds: float,
    agreement: float,
    kinds: tuple[Kind, Kind],
    seed: int,
    progress: Callable[[str, float], None],
) -> dict[str, Any]:
    """Train exits, cut both halves into `folder`, and say what was seen on held-out text."""
    from fedge.edge.llm.collab.fit import Effort
    from fedge.edge.llm.collab.train import train_exits as train

    with tempfile.TemporaryDirectory() as work:
        found = train(
            model,
            text,
            layers,
            Path(work) / "exits.safetensors",
            effort=Effort(seconds=seconds),
            generate=generate,
            agreement=agreement,
            seed=seed,
            progress=progress,
        )
    progress("cutting", 0.0)
    halves.cut(model, folder, found, *kinds)
    for name in TOKENIZER:
        (folder / "edge" / name).unlink(missing_ok=True)  # it may be another model's
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(model / name, folder / "edge" / name)
    progress("cutting", 1.0)
    return {
        "exits": [
            {"layer": one.layer, "temperature": one.temperature, **msgspec.to_builtins(one.figures)}
            for one in found.exits
        ],
        "table": [{"threshold": row.thresholds[0], **msgspec.to_builtins(row)} for row in found.table],
    }


class Device:
    """The device's half with its tokenizer, ready to be asked or served."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer) -> None:
        self.tokenizer, self._decoder = tokenizer, decoder
        self._seen: list[tuple[int, Token | Summary]] | None = None  # of all requests, while `told` works
        self._engine = CollabEngine(decoder, tokenizer, watch=self._watch)

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Handle:
        """As the engine's."""
        return self._engine.submit(request, on_piece)

    def requests(self) -> tuple[int, int]:
        """How many run, and how many wait."""
        return self._engine.requests()

    def stats(self) -> dict[str, float]:
        """The engine's figures."""
        return self._engine.stats()

    def close(self) -> None:
        """End the engine."""
        self._engine.close()

    def told(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """What follows `prompt`, token by token: who said it, how sure, after how many milliseconds."""
        request = Request(tuple(self.tokenizer.encode(prompt)), max_tokens, Sampling(temperature=0.0))
        seen: list[tuple[int, Token | Summary]] = []
        self._seen = seen
        try:
            handle = self.submit(request)
            pieces = list(handle)
        finally:
            self._seen = None
        if pieces[-1].finish == "error":
            raise ModelError(pieces[-1].error)
        mine = [what for key, what in seen if key == handle.key]
        tokens = [one for one in mine if isinstance(one, Token)]
        (summary,) = [one for one in mine if isinstance(one, Summary)]
        stream = self.tokenizer.stream()
        return {
            "text": "".join(piece.text for piece in pieces),
            "tokens": [{"text": stream.push(one.id), **asdict(one)} for one in tokens],
            "summary": {**summary.tokens, **{k: v for k, v in asdict(summary).items() if k != "tokens"}},
        }

    def _watch(self, key: int, what: Token | Summary) -> None:
        seen = self._seen
        if seen is not None:
            seen.append((key, what))


@contextlib.contextmanager
def device(folder: Path, cloud: str | None, settings: Settings, **more: Any) -> Iterator[Device]:
    """The device's half in `folder`, with a line to the cloud if there is one; see fedge.edge.llm.collab.device."""
    with collab_device.device(halves.open_halves(folder), cloud, settings, **more) as decoder:
        opened = Device(decoder, Tokenizer(folder / "edge"))
        try:
            yield opened
        finally:
            opened.close()
