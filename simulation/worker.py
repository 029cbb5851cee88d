"""A worker process: `python -m fedge.simulation.worker`, spoken to over its standard input and output by `pool.Pool`.

Builds one trainer, then trains whatever client it is told, keeping each client's state. Must never talk to anyone else.
"""

import os
import sys
from typing import Any

from fedge.client.trainer import ClientState, Trainer, train
from fedge.core import state as codec
from fedge.core.errors import TrainerError
from fedge.core.registry import load
from fedge.core.task import Broadcast, Task
from fedge.simulation.pool import receive, send


def main() -> None:
    """Serve until the other side closes."""
    stdin, stdout = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a user's code prints must not end up between our messages
    first = receive(stdin)
    trainer: Trainer = load(first["builder"], "worker")(first["settings"])
    send(stdout, {"ready": True})
    states: dict[int, ClientState] = {}
    broadcast: Broadcast | None = None
    while True:
        try:
            message = receive(stdin)
        except EOFError:
            return
        if "broadcast" in message:
            broadcast = codec.convert(message["broadcast"], Broadcast)
        if broadcast is None:
            sys.exit("a task came before any model")
        send(stdout, answer(trainer, message, broadcast, states.setdefault(message["index"], {})))


def answer(trainer: Trainer, message: dict[str, Any], broadcast: Broadcast, state: ClientState) -> dict[str, Any]:
    """{"update": ...} or {"error": sentence}."""
    task = codec.convert(message["task"], Task)
    try:
        return {"update": train(trainer, task, broadcast, message["shard"], state)}
    except TrainerError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    main()
