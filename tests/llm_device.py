"""A model cut in two for a device and a cloud, what the whole model says, and clouds in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import grpc
import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.collab.decoder import Decoder, Settings, Token
from fedge.edge.llm.collab.exits import Exit, untrained
from fedge.edge.llm.collab.halves import Halves, cut
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.uplink import Uplink
from fedge.edge.llm.collab.wire import SERVICE, Asked, Coding, Hidden, Told, asked, told_bytes
from fedge.edge.llm.compute.kernels import named
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.engine.sampler import Sampling, sample
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.models.config import read
from fedge.edge.llm.models.folder import open_folder
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.shard import Shard, export, open_shard
from fedge.edge.llm.shards.shares import even
from fedge.protos import llm_pb2 as pb
from tests.llm_fixture import folder

KERNEL = "numpy-rows-float32"  # each row as if it were alone
GREEDY = Sampling(temperature=0.0)
CONTEXT = 96


def blocks(shard: Shard) -> Resident:
    return Resident(shard, named(KERNEL, shard.kind))


@dataclass
class Cut:
    """A model, its halves, and exits that are as sure as `temperature` makes them."""

    model: Path
    halves: Halves
    shards: tuple[Shard, ...]
    exits: tuple[Exit, ...]

    @property
    def cloud(self) -> Path:
        return self.halves.path / "cloud/layers.safetensors"

    def segments(self) -> Segments:
        return Segments(self.shards, blocks, context=CONTEXT)

    def uplink(self, address: str, coding: Coding = "f32", **more: Any) -> Uplink:
        layer, hidden = self.halves.exits[-1], self.shards[0].config.hidden
        return Uplink(address, model=self.halves.model, layer=layer, hidden=hidden, coding=coding, **more)


def cut_model(
    tmp: Path, *, layers: int = 4, exits: tuple[int, ...] = (1, 2), temperature: float = 0.3, **more: Any
) -> Cut:
    """`more` goes to the model's folder."""
    path = folder(tmp, layers=layers, **more)
    with open_folder(path) as opened:
        found = untrained(opened, exits)
    found = replace(found, exits=tuple(replace(one, temperature=temperature) for one in found.exits))
    halves = cut(path, tmp / f"halves-{path.name}", found, "float32", "float32")
    shards, loaded = halves.edge()
    return Cut(path, halves, shards, loaded.exits)


@contextmanager
def whole(model: Path, out: Path) -> Iterator[Model]:
    """The model on one device."""
    with open_folder(model) as source:
        shard = open_shard(export(source, out, even(read(model), 1), "float32")[0])
    made = Model(shard, blocks(shard), Alone(), slots=1, context=CONTEXT)
    try:
        yield made
    finally:
        made.close()


def says(model: Model, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """The whole model's tokens."""
    text, fresh = list(prompt), list(prompt)
    for _ in range(count):
        start = len(text) - len(fresh)
        logits = model.run(Step((Part(0, start, len(fresh)),), free=(0,) if start == 0 else ()), np.array(fresh))
        fresh = [sample(logits[0], sampling, {}, len(text))]
        text += fresh
    return text[len(prompt) :]


def logits_of(model: Model, ids: Sequence[int]) -> Array:
    """The whole model's logits behind every token."""
    return model.run(Step((Part(0, 0, len(ids)),), free=(0,)), np.array(ids), np.arange(len(ids)))


@contextmanager
def decoder(
    model: Cut, address: str | None, settings: Settings, coding: Coding = "f32", *, wait: bool = True
) -> Iterator[Decoder]:
    """With a line to the cloud at `address` that stands, if `wait`."""
    with ExitStack() as opened:
        segments = model.segments()
        opened.callback(segments.close)
        uplink = model.uplink(address, coding) if address else None
        if uplink:
            opened.callback(uplink.close)
            assert not wait or uplink.wait(30), uplink.trouble
        yield Decoder(segments, model.exits, uplink, settings)


def answer(made: Decoder, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[Token]:
    return list(made.run(prompt, sampling, count))


_SERVE = """
import sys
from pathlib import Path
from fedge.edge.llm.collab.cloud import serve_cloud
serve_cloud(Path(sys.argv[1]), sys.argv[2], kernel=sys.argv[3], on_listening=lambda address: print(address, flush=True))
"""


class CloudProcess:
    """A cloud that can be stopped, killed and started again at its address."""

    def __init__(self, shard: Path) -> None:
        self._shard, self.address = shard, "127.0.0.1:0"
        self.start()

    def start(self) -> None:
        argv = [sys.executable, "-c", _SERVE, str(self._shard), self.address, KERNEL]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self.address = self._out.readline().strip()
        assert self.address, "the cloud did not start"

    @property
    def _out(self) -> IO[str]:
        assert self._process.stdout
        return self._process.stdout

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def heal(self) -> None:
        """As if nothing had happened."""
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
        else:
            self.start()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(30)
        self._out.close()

    def __enter__(self) -> "CloudProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


class Scripted:
    """A server of Talk that writes down what it is asked, and says what `script` says to it: Told, or bytes."""

    def __init__(self, model: Cut, script: Callable[[Asked], Sequence[Told | bytes]]) -> None:
        self.asked: list[Asked] = []
        self.sizes: list[int] = []
        self.streams = 0
        self._model, self._script = model, script
        self._pool = ThreadPoolExecutor(8)
        self._server = grpc.server(self._pool)
        handlers = {
            "Meet": grpc.unary_unary_rpc_method_handler(
                self._meet, pb.MeetRequest.FromString, pb.MeetReply.SerializeToString
            ),
            "Talk": grpc.stream_stream_rpc_method_handler(self._talk),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @property
    def positions(self) -> list[int]:
        """Of all states, in the order in which they came."""
        return [
            at for one in self.asked if isinstance(one, Hidden) for at in range(one.start, one.start + len(one.rows))
        ]

    def _meet(self, request: Any, _: Any) -> Any:
        return pb.MeetReply(model=self._model.halves.model, context=CONTEXT, max_ask_bytes=1 << 22, max_guesses=16)

    def _talk(self, messages: Iterator[bytes], _: Any) -> Iterator[bytes]:
        self.streams += 1
        for data in messages:
            one = asked(data, self._model.shards[0].config.hidden)
            self.sizes.append(len(data))
            self.asked.append(one)
            for reply in self._script(one):
                yield reply if isinstance(reply, bytes) else told_bytes(reply)

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait(30)
        self._pool.shutdown()


def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait for it; fail where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
