"""Worker processes that train: each keeps one resident model, and every client belongs to one worker for good.

Owns the pipes to `fedge.simulation.worker`. What goes through them is MessagePack of this program's own making; no
code and no pickled object does. Must never change what is computed: only where.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from fedge.client.trainer import Shard
from fedge.core import state as codec
from fedge.core.errors import OurFault, TrainerError
from fedge.core.task import Broadcast, Task, Update

HEADER_BYTES = 8


def send(pipe: IO[bytes], message: Any) -> None:
    """One message: its length, then MessagePack."""
    parts = codec.encode_parts(message)
    pipe.write(sum(map(len, parts)).to_bytes(HEADER_BYTES, "big"))
    pipe.writelines(parts)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """The next message. Raises EOFError where the other side has gone."""
    head = pipe.read(HEADER_BYTES)
    data = pipe.read(int.from_bytes(head, "big")) if len(head) == HEADER_BYTES else b""
    if not data:
        raise EOFError
    return codec.decode(data)


class Worker:
    """One child process and the thread that talks to it, so that the engine never waits for a full pipe."""

    def __init__(self, builder: str, settings: Mapping[str, Any]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedge-worker")
        command = [sys.executable, "-m", "fedge.simulation.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._version = -1
        self._thread.submit(self._call, {"builder": builder, "settings": dict(settings)})

    def submit(self, shard: Shard, index: int, task: Task, broadcast: Broadcast) -> "Future[Any]":
        """Ask for one task; answers come in the order asked."""
        return self._thread.submit(self._train, shard, index, task, broadcast)

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def _train(self, shard: Shard, index: int, task: Task, broadcast: Broadcast) -> Any:
        message: dict[str, Any] = {"index": index, "task": task, "shard": shard}
        if broadcast.version != self._version:  # the worker keeps the last one it was sent
            message["broadcast"] = broadcast
            self._version = broadcast.version
        return self._call(message)

    def _call(self, message: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise OurFault("A worker has no pipes.")
        try:
            send(stdin, message)
            return receive(stdout)
        except (EOFError, OSError):
            raise OurFault("A worker process died; run with simulation.processes = 0 to see why.") from None


class Pool:
    """`processes` workers; client i belongs to worker i modulo their number, where its state lives."""

    def __init__(self, processes: int, builder: str, settings: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        self._workers = [Worker(builder, settings) for _ in range(processes)]
        self._shards = shards
        self._asked: dict[str, Future[Any]] = {}

    def submit(self, index: int, task: Task, broadcast: Broadcast) -> None:
        """Begin a task."""
        worker = self._workers[index % len(self._workers)]
        self._asked[task.id] = worker.submit(self._shards[index], index, task, broadcast)

    def result(self, index: int, task: Task) -> Update:
        """Wait for a task. Raises TrainerError as the trainer did."""
        answer = self._asked.pop(task.id).result()
        if "error" in answer:
            raise TrainerError(answer["error"])
        return codec.convert(answer["update"], Update)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()
