"""The HTTP server on a real socket, over a real engine and a small model of random weights."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.core.limits import LlmLimits
from fedge.edge.llm.api.http import app
from fedge.edge.llm.api.http_server import Server
from fedge.edge.llm.engine.engine import Engine
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.config import read
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.models.tokenizer import Tokenizer
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.shards.shard import export, open_shard
from fedge.edge.llm.shards.shares import even
from tests.llm_fixture import folder
from tests.llm_ranks import Plain

NAME = "tiny/random"
VOCAB = 320
ON = {"logit_bias": {"2": -100}}  # the end token never comes


@dataclass
class Served:
    """A server that runs in a thread."""

    address: str
    engine: Engine
    tokenizer: Tokenizer
    server: Server

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def settle(self) -> dict[str, float]:
        """The engine's figures once nothing runs or waits."""
        until = time.monotonic() + 20
        while (stats := self.engine.stats())["running"] or stats["waiting"]:
            assert time.monotonic() < until, "a request is never ended"
            time.sleep(0.005)
        return stats


@contextmanager
def served(
    tmp: Path,
    *,
    slots: int = 4,
    context: int = 160,
    limits: LlmLimits = LlmLimits(),
    api_key: str | None = None,
    wrap: Callable[[Any], Any] = lambda model: model,
    **more: Any,
) -> Iterator[Served]:
    """`wrap` may stand between engine and model; `more` goes to the model's folder."""
    path = folder(tmp, vocab=VOCAB, layers=1, **more)
    with open_folder(path) as source:
        shard = open_shard(export(source, tmp, even(read(path), 1), "float32")[0])
    model = Model(shard, Plain(shard), Alone(), slots=slots, context=context)
    tokenizer = Tokenizer(path)
    engine = Engine(wrap(model), tokenizer, vocab=VOCAB, slots=slots, context=context, limits=limits)
    made = app(engine, tokenizer, NAME, limits=limits, api_key=api_key)
    with Server(made, "127.0.0.1:0", limits) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield Served(server.address, engine, tokenizer, server)
        finally:
            server.stop()
            thread.join(20)
            engine.close()
            model.close()
            assert not thread.is_alive(), "the server does not end"


def call(
    live: Served, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one request on its own connection."""
    line = http.client.HTTPConnection(live.address, timeout=20)
    try:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        line.request(method, path, body, kind | (headers or {}))
        response = line.getresponse()
        return response.status, dict(response.getheaders()), json.loads(response.read())
    finally:
        line.close()


def is_error(status: int, answer: Any) -> bool:
    """Whether the answer is an error, which must have OpenAI's form."""
    error = answer["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"].endswith((".", "!", "?", ")"))
    return status >= 400
