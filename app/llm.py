"""A language model on this machine and others, ready to be asked: `fedge.llm.Engine`.

Owns how folder, group of ranks, tokenizer and engine are put together. Must never compute.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from fedge.core.errors import ExperimentError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.engine import engine as engines
from fedge.edge.llm.engine.handle import Handle
from fedge.edge.llm.engine.requests import Piece, Request
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.group.division import everyone, planned
from fedge.edge.llm.group.group import Group
from fedge.edge.llm.group.local import local
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.models.config import Config
from fedge.edge.llm.models.folder import Folder, open_folder
from fedge.edge.llm.models.template import Messages
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.shards.quant import Kind
from fedge.edge.runtime.memory import resident

__all__ = ["Engine", "Request", "Sampling", "default_store"]

COME_S = 600.0  # for devices to come; what they load then has limits of its own
MOST_CONTEXT = 4096  # unless told else: keys and values are memory


def default_store() -> Path:
    """Where shards lie unless told else; by the XDG base directory specification."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if Path(named).is_absolute() else Path("~/.cache").expanduser()
    return base / "fedge" / "llm"


def context_for(asked: int | None, config: Config) -> int:
    """Tokens of a request, prompt and answer: as asked, else the model's, but at most MOST_CONTEXT.

    Raises ExperimentError for more than the model has, and for none.
    """
    return min(MOST_CONTEXT, config.context) if asked is None else config.room(asked)


class Engine:
    """Answers prompts with the model in `folder` (Hugging Face's format), by ranks that share every layer.

    `ranks` processes on this machine, or `devices` others that come by `fedge llm join` to `listen`, which needs a
    `ticket` and its `key` off loopback; they dial this one at `data_port` (0: any). The planner takes as many as are
    best, `use_all` every one. `kind` is how weights are held: float32, int8 or int4. `memory_bytes` are for each rank
    here (None: what is free, shared); what of the weights does not fit is read from the disk at every token. `exchange`
    is how ranks add up, where it shall not be chosen by measuring: full, doubling, star, or int8, which rounds what
    passes for several tokens at once. `invariant` admits only ways to compute in which a sequence's bits do not depend
    on who shares its passes.
    `slots` requests run at a time, of `context` tokens each, no more than the model's (None: as many, but at most
    4096). A rank that dies is replaced by the others, and answers under way go on. Raises ModelError, ExperimentError,
    AddressError.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        ranks: int = 1,
        kind: Kind = "int8",
        memory_bytes: int | None = None,
        slots: int = 4,
        context: int | None = None,
        store: Path | None = None,
        devices: int = 0,
        listen: str = "127.0.0.1:0",
        ticket: Ticket | None = None,
        key: str = "",
        data_port: int = 0,
        kernel: str | None = None,
        exchange: str | None = None,
        invariant: bool = False,
        use_all: bool = False,
        limits: LlmLimits = LlmLimits(),
    ) -> None:
        if devices and ranks > 1:
            raise ExperimentError("Ranks here and devices elsewhere cannot be mixed; let the ranks here join, too.")
        self._opened = contextlib.ExitStack()
        try:
            self.folder: Folder = self._opened.enter_context(open_folder(Path(folder), limits))
            self.context = context_for(context, self.folder.config)
            self.tokenizer = Tokenizer(Path(folder), limits)
            settings: dict[str, Any] = {
                "kind": kind,
                "store": store or default_store(),
                "memory_bytes": memory_bytes,
                "slots": slots,
                "context": self.context,
                "kernel": kernel,
                "collective": exchange,
                "invariant": invariant,
                "divide": everyone if use_all else planned,
                "limits": limits,
            }
            self.group: Group = self._opened.enter_context(
                Group(
                    self.folder,
                    listen=listen,
                    ticket=ticket,
                    key=key,
                    data_port=data_port,
                    wanted=devices,
                    **settings,
                )
                if devices
                else local(self.folder, ranks, **settings)
            )
            self.engine = engines.Engine(
                self.group.form(COME_S),
                self.tokenizer,
                vocab=self.folder.config.vocab,
                slots=slots,
                context=self.context,
                speculate=not invariant,  # how many tokens are guessed depends on who shares the pass
                limits=limits,
                recover=self.group.recover,
                between=self.group.improve,
                give_up=self.group.give_up,
            )
            self._opened.callback(self.engine.close)
        except BaseException:  # raised again: what was opened must not outlive a start that failed
            self._opened.close()
            raise

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(temperature=0.0),
        stop: str | Iterable[str] = (),
    ) -> Handle:
        """What follows `prompt`, up to `stop`, piece by piece; greedy unless told. Raises DataError, Overloaded."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return self.engine.submit(Request(tuple(tokens), max_tokens, sampling, stops))

    def chat(self, messages: Messages, *, max_tokens: int | None = None, sampling: Sampling = Sampling()) -> Handle:
        """The answer to a conversation, piece by piece. Raises DataError, ModelError (no template), Overloaded."""
        tokens = self.tokenizer.encode(self.tokenizer.chat(messages), special=False)
        return self.engine.submit(Request(tuple(tokens), max_tokens, sampling))

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Handle:
        """As the engine's own: for whoever serves it."""
        return self.engine.submit(request, on_piece)

    def requests(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return self.engine.requests()

    def stats(self) -> dict[str, float]:
        """The engine's figures, and what the ranks hold and send: bytes by rank as they last said."""
        found = self.engine.stats() | {"sent_bytes": self.group.sent_bytes}
        own = resident()
        if own is not None:
            found |= {'memory_private_bytes{rank="0"}': own.private, 'memory_file_bytes{rank="0"}': own.mapped}
        there = {member.name: member for member in self.group.devices()}
        for rank, name in enumerate(self.group.names[1:], 1):
            if member := there.get(name):
                found[f'memory_private_bytes{{rank="{rank}"}}'] = member.private_bytes
                found[f'memory_file_bytes{{rank="{rank}"}}'] = member.mapped_bytes
        return found

    def close(self) -> None:
        """End requests, ranks and processes."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
