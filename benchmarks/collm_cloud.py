"""The clouds of the collaborative benchmark, each a process of its own: fedge's, and the plain one it is compared with.

The plain cloud has the whole model and the upper layers, and speaks the least that will do: one socket, TCP_NODELAY, a
header of 12 bytes, then token numbers of 4 bytes or states in float32; every token goes down as 4 bytes. It answers
with a stream of tokens, with one token at a time, or with the token behind states of the whole prefix, of which it
keeps nothing. Owns both ends of that protocol. Must never be used for more than a benchmark: it trusts both ends.
"""

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from fedge.core.params import Array
from fedge.edge.llm.collab.cloud import serve_cloud
from fedge.edge.llm.compute.kernels import named
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.mesh.mesh import Alone
from fedge.edge.llm.ranks.head import Head
from fedge.edge.llm.ranks.model import Model
from fedge.edge.llm.ranks.rank import Rank
from fedge.edge.llm.ranks.step import Part, Step
from fedge.edge.llm.shards.shard import Shard, open_shard

Call = Literal["stream", "begin", "next", "states"]
CALLS: tuple[Call, ...] = get_args(Call)
END = 0xFFFFFFFF  # behind the last token of a stream
TIMEOUT_S = 60.0
_HEADER = struct.Struct("<III")  # the call, how many tokens or rows follow, how many tokens are wanted
_TOKEN = struct.Struct("<I")


def model(shard: Shard, kernel: str, context: int) -> Model:
    """A whole model in this process."""
    return Model(shard, Resident(shard, named(kernel, shard.kind)), Alone(), slots=1, context=context)


def forward(whole: Model, ids: Sequence[int], start: int, rows: Array | None = None) -> Array:
    """Logits behind `ids` at the positions from `start` on: of the last one, or of `rows`."""
    step = Step((Part(0, start, len(ids)),), free=() if start else (0,))
    return whole.run(step, np.asarray(ids, np.int64), rows)


def greedy(whole: Model, ids: Sequence[int], most: int) -> Iterator[int]:
    """Up to `most` tokens after `ids`, the last of them maybe an end."""
    start, fresh = 0, list(ids)
    for _ in range(most):
        token = int(forward(whole, fresh, start)[0].argmax())
        yield token
        if token in whole.config.eos:
            return
        start, fresh = start + len(fresh), [token]


class Plain:
    """A device's end."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._line = socket.create_connection((host, int(port)), TIMEOUT_S)
        self._line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_bytes = self.received_bytes = self.asked = 0

    def stream(self, ids: Sequence[int], most: int) -> Iterator[int]:
        """Tokens as they come."""
        self._send("stream", ids, most)
        while (token := self._token()) != END:
            yield token

    def one(self, call: Call, ids: Sequence[int]) -> int:
        """The token after `ids`: "begin" of a text, or "next" of it."""
        self._send(call, ids, 1)
        return self._token()

    def behind(self, states: Array) -> int:
        """The token after the last row of states [n, hidden] of a whole prefix."""
        self._write(_HEADER.pack(CALLS.index("states"), len(states), 1) + states.astype("<f4").tobytes())
        return self._token()

    def close(self) -> None:
        """Hang up."""
        self._line.close()

    def _send(self, call: Call, ids: Sequence[int], most: int) -> None:
        self._write(_HEADER.pack(CALLS.index(call), len(ids), most) + np.asarray(ids, "<u4").tobytes())

    def _write(self, data: bytes) -> None:
        self._line.sendall(data)
        self.sent_bytes += len(data)
        self.asked += 1

    def _token(self) -> int:
        self.received_bytes += _TOKEN.size
        return int(_TOKEN.unpack(_exactly(self._line, _TOKEN.size))[0])


class _Server:
    """One line at a time."""

    def __init__(self, whole: Shard, upper: Shard, kernel: str, context: int) -> None:
        self._whole = model(whole, kernel, context)
        blocks = Resident(upper, named(kernel, upper.kind))
        self._rank, self._head = Rank(upper, blocks, Alone(), slots=1, context=context), Head(upper, blocks)
        self._length = 0

    def serve(self, line: socket.socket) -> None:
        """Until the device hangs up."""
        while True:
            number, count, most = _HEADER.unpack(_exactly(line, _HEADER.size))
            call = CALLS[number]
            if call == "states":
                data = _exactly(line, 4 * count * self._whole.config.hidden)
                line.sendall(_TOKEN.pack(self._behind(np.frombuffer(data, "<f4").reshape(count, -1))))
                continue
            ids = np.frombuffer(_exactly(line, 4 * count), "<u4").tolist()
            if call == "stream":
                for token in greedy(self._whole, ids, most):
                    line.sendall(_TOKEN.pack(token))
                line.sendall(_TOKEN.pack(END))
                continue
            self._length *= call == "next"
            token = int(forward(self._whole, ids, self._length)[0].argmax())
            self._length += count
            line.sendall(_TOKEN.pack(token))

    def _behind(self, states: Array) -> int:
        x = self._rank.forward(Step((Part(0, 0, len(states)),), free=(0,)), np.array(states, np.float32))
        return int(self._head.logits(x[-1:])[0].argmax())


def _exactly(line: socket.socket, count: int) -> bytes:
    """Raises EOFError where the other end is gone."""
    data = bytearray()
    while len(data) < count:
        part = line.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def one_thread() -> dict[str, str]:
    """The environment of a process whose products have one thread, whoever computes them."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


@contextmanager
def process(*argv: str) -> Iterator[str]:
    """A cloud with these arguments; yields its address."""
    command = [sys.executable, "-m", __name__, *argv]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=one_thread(), **pipes) as child:
        try:
            assert child.stdout
            address = child.stdout.readline().strip()
            assert address, "the cloud did not start"
            yield address
        finally:
            child.kill()


def main(what: str, kernel: str, context: str, *shards: str) -> None:
    """The child: "fedge" has one shard, "plain" the whole model's and that of the upper layers."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings: dict[str, Any] = {"kernel": kernel, "context": int(context)}
    if what == "fedge":
        serve_cloud(Path(shards[0]), "127.0.0.1:0", on_listening=lambda address: print(address, flush=True), **settings)
        return
    whole, upper = (open_shard(Path(shard)) for shard in shards)
    server = _Server(whole, upper, kernel, int(context))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{cast('int', listener.getsockname()[1])}", flush=True)
        while True:
            line, _ = listener.accept()
            with line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                try:
                    server.serve(line)
                except (EOFError, ConnectionError):
                    continue


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
