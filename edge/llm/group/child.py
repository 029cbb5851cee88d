"""A worker as a child process of the head on the same machine: settings come on its standard input, which stays open.

When that ends the head is gone, however it went, and so is the child. What goes wrong is one sentence on its standard
output, which carries nothing else. Owns nothing else.
"""

import logging
import os
import sys
import threading
from pathlib import Path

import msgspec

from fedge.core.errors import FedgeError
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group.device import run
from fedge.edge.llm.group.speeds import Speeds
from fedge.edge.llm.mesh.security import Ticket

_GRACE_S = 5.0  # for an orderly end


class Settings(msgspec.Struct, frozen=True):
    """Of one child; see `device.run`."""

    address: str
    name: str
    memory_bytes: int
    store: str
    token: str
    kernel: str | None
    speed: Speeds | None
    limits: LlmLimits


def argv() -> list[str]:
    """The words that start a child."""
    return [sys.executable, "-m", __name__]


def main() -> None:
    """Read settings, and work until the standard input ends. Exits with the code of what went wrong."""
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=Settings)
    stop = threading.Event()
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()
    try:
        run(
            settings.address,
            name=settings.name,
            memory_bytes=settings.memory_bytes,
            store=Path(settings.store),
            ticket=Ticket("", settings.token),
            kernel=settings.kernel,
            speed=settings.speed,
            stop=stop,
            limits=settings.limits,
        )
    except FedgeError as error:
        said.write(str(error))
        said.close()
        sys.exit(error.exit_code)


def _watch(stop: threading.Event) -> None:
    """Whatever the worker hangs in, it does not outlive its parent."""
    while os.read(sys.stdin.fileno(), 1 << 16):
        pass
    stop.set()
    timer = threading.Timer(_GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
