"""A group on one machine: the head in this process, the other ranks in children that end with it.

Owns the children, and the finding that one is dead before it has come. Must never be the only way to have a group.
"""

import contextlib
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fedge.core.errors import ExperimentError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group.blocks import spare_bytes
from fedge.edge.llm.group.child import Settings, argv
from fedge.edge.llm.group.group import Group
from fedge.edge.llm.group.speeds import Speeds, speeds
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.models.folder import Folder
from fedge.edge.llm.shards.quant import Kind

_END_S = 10.0  # for a child to end by itself


@contextlib.contextmanager
def local(
    folder: Folder,
    ranks: int,
    *,
    kind: Kind,
    store: Path,
    memory_bytes: int | None = None,
    kernel: str | None = None,
    speed: Speeds | None = None,
    limits: LlmLimits = LlmLimits(),
    **settings: Any,
) -> Iterator[Group]:
    """A Group that has not been formed yet, and `ranks` - 1 children on their way to it; see Group for `settings`.

    `memory_bytes` are each rank's. Strangers on the same machine cannot join: children know a word of their own.
    Raises ExperimentError for no ranks, and as Group; `form` raises what a child that has ended at once said.
    """
    if not 1 <= ranks <= limits.max_ranks:
        raise ExperimentError(f"{ranks} ranks cannot hold a model; ask for 1 to {limits.max_ranks}.")
    ticket = Ticket("", secrets.token_urlsafe(32))
    memory = spare_bytes() // ranks if memory_bytes is None else memory_bytes
    started: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as opened:
        group = Group(
            folder,
            kind=kind,
            store=store,
            ticket=ticket,
            wanted=ranks - 1,
            memory_bytes=memory,
            kernel=kernel,
            speed=speed,
            watch=lambda: _require_alive(started),
            limits=limits,
            **settings,
        )
        children = opened.enter_context(contextlib.ExitStack())
        opened.callback(group.close)
        known = speed or speeds(store)  # which the group has measured
        for number in range(1, ranks):
            name = f"local-{number}"
            one = Settings(group.address, name, memory, str(store / name), ticket.token, kernel, known, limits)
            started.append(children.enter_context(child(one)))
        yield group


@contextlib.contextmanager
def child(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in a process of its own, until the end of the context."""
    # A group of its own: Ctrl-C is for the head, which ends its children when answers under way have ended.
    process = subprocess.Popen(argv(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
    pipe, said = process.stdin, process.stdout
    if pipe is None or said is None:
        raise AssertionError("unreachable")
    try:
        with contextlib.suppress(BrokenPipeError):
            pipe.write(msgspec.json.encode(settings) + b"\n")
            pipe.flush()
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.close()


def _require_alive(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Raises ExperimentError with what a child said before it ended, RankLost where it said nothing."""
    for number, process in enumerate(children, 1):
        code = process.poll()
        if code is None:
            continue
        said = process.stdout.read().decode(errors="replace") if process.stdout and not process.stdout.closed else ""
        if said:
            raise ExperimentError(said)
        raise RankLost(f"The process of rank {number} has ended (exit code {code}); see what it wrote.", number)
