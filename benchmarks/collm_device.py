"""The device of the collaborative benchmark, a process of its own: it answers prompts in each of the ways compared.

The parent gives an order, waits until the device is ready (its line stands and it has answered once), says when to
begin, and is told what the answers took. The device is a process so that neither the relay nor the clouds take its
interpreter's time. Owns the ways. Must never choose what is measured.
"""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from select import select
from typing import Any, Literal

import msgspec
import numpy as np

from benchmarks.collm_cloud import Plain, one_thread
from fedge.edge.llm.collab.decoder import Decoder, Mode, Settings
from fedge.edge.llm.collab.device import device
from fedge.edge.llm.collab.halves import Halves, open_halves
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.wire import Coding
from fedge.edge.llm.compute.kernels import named
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.engine.sampler import Sampling

Way = Mode | Literal["stream", "each", "resend"]
WARM_TOKENS = 3
DEADLINE_S = 20.0
READY_S, ANSWER_S = 120.0, 300.0
_GREEDY = Sampling(temperature=0.0)


class Order(msgspec.Struct, frozen=True):
    """What to do: `prompts` one after the other, up to `most` tokens each, over the cloud at `address`."""

    way: Way
    address: str
    prompts: tuple[tuple[int, ...], ...]
    most: int
    threshold: float = 1.0
    coding: Coding = "f16"


class Taken(msgspec.Struct, frozen=True):
    """What it took. Bytes are those of messages, up and down; `asked` questions to the cloud, `guesses` of all."""

    ids: tuple[tuple[int, ...], ...]
    seconds: float
    first_s: float  # mean time to an answer's first token
    sent_bytes: int
    received_bytes: int
    asked: int = 0
    guesses: int = 0
    labels: dict[str, int] = {}


class _Sums:
    """What answers add up to."""

    def __init__(self) -> None:
        self.sent_bytes = self.received_bytes = self.asked = self.guesses = 0
        self.labels: Counter[str] = Counter()


Answer = Callable[[tuple[int, ...], int, _Sums], Iterator[int]]


@contextmanager
def answering(order: Order, halves: Halves, kernel: str, context: int) -> Iterator[Answer]:
    """A way to answer, with a line that stands."""
    with ExitStack() as opened:
        if order.way in ("exits", "speculative", "standalone"):
            settings = Settings(order.way, order.threshold, DEADLINE_S)
            address = None if order.way == "standalone" else order.address
            stops = halves.edge()[0][0].config.eos
            made = opened.enter_context(
                device(halves, address, settings, coding=order.coding, context=context, kernel=kernel)
            )
            _wait(lambda: address is None or made.cloud_usable)
            yield lambda prompt, most, sums: _collaborating(made, stops, prompt, most, sums)
            return
        line = Plain(order.address)
        opened.callback(line.close)
        segments = Segments(halves.edge()[0], lambda shard: Resident(shard, named(kernel, shard.kind)), context=context)
        opened.callback(segments.close)
        tokens = {"stream": _streamed, "each": _each, "resend": _resent}[order.way]
        yield lambda prompt, most, sums: _counted(tokens(line, segments, prompt, most), line, sums)


def _wait(ready: Callable[[], bool]) -> None:
    until = time.monotonic() + READY_S
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError("There is no line to the cloud.")
        time.sleep(0.01)


def _collaborating(
    made: Decoder, stops: tuple[int, ...], prompt: tuple[int, ...], most: int, sums: _Sums
) -> Iterator[int]:
    for token in made.run(prompt, _GREEDY, most, stops):
        yield token.id
    found = made.summary
    sums.labels += found.tokens
    sums.sent_bytes += found.sent_bytes
    sums.received_bytes += found.received_bytes
    sums.asked += found.cloud_requests
    sums.guesses += found.guesses


def _counted(tokens: Iterator[int], line: Plain, sums: _Sums) -> Iterator[int]:
    sent, received, asked = line.sent_bytes, line.received_bytes, line.asked
    for token in tokens:
        sums.labels["cloud"] += 1
        yield token
    sums.asked += line.asked - asked
    sums.sent_bytes += line.sent_bytes - sent
    sums.received_bytes += line.received_bytes - received


def _streamed(line: Plain, _: Segments, prompt: tuple[int, ...], most: int) -> Iterator[int]:
    """One request; tokens come as they are computed."""
    return line.stream(prompt, most)


def _each(line: Plain, segments: Segments, prompt: tuple[int, ...], most: int) -> Iterator[int]:
    """Every token is asked for by itself, with the one before it; the cloud keeps keys and values."""
    fresh: tuple[int, ...] = prompt
    for number in range(most):
        fresh = (line.one("next" if number else "begin", fresh),)
        yield fresh[0]
        if fresh[0] in segments.config.eos:
            return


def _resent(line: Plain, segments: Segments, prompt: tuple[int, ...], most: int) -> Iterator[int]:
    """The states of the whole prefix go up for every token, in float32; the device keeps its keys and values."""
    segments.clear()
    fresh, states = prompt, np.empty((0, segments.config.hidden), np.float32)
    for _ in range(most):
        segments.feed(fresh)
        states = np.concatenate([states, segments.reach(len(segments.ends) - 1)])
        segments.take_states()
        fresh = (line.behind(states),)
        yield fresh[0]
        if fresh[0] in segments.config.eos:
            return


def answered(order: Order, answer: Answer) -> Taken:
    """All prompts of an order."""
    sums, ids, firsts = _Sums(), [], 0.0
    began_at = time.perf_counter()
    for prompt in order.prompts:
        since, tokens = time.perf_counter(), list[int]()
        for token in answer(prompt, order.most, sums):
            firsts += 0.0 if tokens else time.perf_counter() - since
            tokens.append(token)
        ids.append(tuple(tokens))
    return Taken(
        tuple(ids),
        time.perf_counter() - began_at,
        firsts / len(ids),
        sums.sent_bytes,
        sums.received_bytes,
        sums.asked,
        sums.guesses,
        dict(sums.labels),
    )


class Device:
    """The parent's end of the process. A context manager."""

    def __init__(self, halves: Path, kernel: str, context: int) -> None:
        command = [sys.executable, "-m", __name__, str(halves), kernel, str(context)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self._child = subprocess.Popen(command, env=one_thread(), **pipes)

    def take(self, order: Order, begin: Callable[[], None] = lambda: None) -> Taken:
        """Have an order done; `begin` is called when the device is ready, ahead of the first answer."""
        self._say(msgspec.json.encode(order))
        if self._hear(READY_S) != b"ready":
            raise ChildProcessError("The device is out of order.")
        begin()
        self._say(b"go")
        return msgspec.json.decode(self._hear(ANSWER_S), type=Taken)

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def _say(self, line: bytes) -> None:
        assert self._child.stdin
        self._child.stdin.write(line + b"\n")

    def _hear(self, timeout_s: float) -> bytes:
        """A line. Raises ChildProcessError."""
        assert self._child.stdout
        if not select([self._child.stdout], [], [], timeout_s)[0]:
            raise ChildProcessError(f"The device has said nothing for {timeout_s} s.")
        line = bytes(self._child.stdout.readline())
        if not line:
            raise ChildProcessError("The device has died.")
        return line.strip()


def main(path: str, kernel: str, context: str) -> None:
    """The child."""
    halves = open_halves(Path(path))
    for line in iter(sys.stdin.readline, ""):
        order = msgspec.json.decode(line, type=Order)
        with answering(order, halves, kernel, int(context)) as answer:
            list(answer(order.prompts[0], WARM_TOKENS, _Sums()))
            print("ready", flush=True)
            sys.stdin.readline()
            taken = answered(order, answer)
        print(msgspec.json.encode(taken).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
