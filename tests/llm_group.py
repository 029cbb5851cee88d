"""Ranks of a mesh in threads of this process, over real sockets."""

import socket
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fedge.core.limits import LlmLimits
from fedge.edge.llm.mesh.mesh import Mesh, connect
from fedge.edge.llm.mesh.security import Tls, identity

KEY = b"the session's secret of the test"
LIMITS = LlmLimits(connect_timeout_s=30.0, step_timeout_s=30.0)  # nothing that works comes near them
T = TypeVar("T")


def listeners(size: int) -> tuple[list[socket.socket], list[str]]:
    """Bound sockets on loopback, and their addresses."""
    made = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    return made, [f"127.0.0.1:{one.getsockname()[1]}" for one in made]


def credentials(size: int) -> list[Tls]:
    """What each rank needs to speak TLS with the others."""
    made = [identity() for _ in range(size)]
    return [Tls(certificate, key, tuple(one for one, _ in made)) for certificate, key in made]


def in_threads(works: list[Callable[[], T]]) -> list[T | Exception]:
    """What each returned or raised."""
    results: list[Any] = [None] * len(works)

    def run(at: int) -> None:
        try:
            results[at] = works[at]()
        except Exception as error:
            results[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a rank hangs"
    return results


def group(size: int, work: Callable[[Mesh], T], limits: LlmLimits = LIMITS, **settings: Any) -> list[T | Exception]:
    """What `work` returned or raised on every rank."""
    made, addresses = listeners(size)
    secrets = credentials(size) if settings.pop("secure", False) else [None] * size

    def one(rank: int) -> T:
        more = {"listener": made[rank], "limits": limits, "tls": secrets[rank]} | settings
        with connect(rank, size, addresses, KEY, 3, **more) as mesh:
            return work(mesh)

    try:
        return in_threads([lambda rank=rank: one(rank) for rank in range(size)])  # type: ignore[misc]
    finally:
        for listener in made:
            listener.close()
