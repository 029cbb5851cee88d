"""A coordinator as a process that can be told to die: python -m tests.coordinator_process FOLDER PORT POINT.

POINT is "never" or NAME:COUNT, where NAME is a key of POINTS: SIGKILL at that call of the function, before or after it.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedge.core.limits import Limits
from fedge.server.coordinator import journal, serve, spool
from fedge.server.coordinator.journal import Journal
from fedge.server.coordinator.replay import Run
from fedge.server.coordinator.versions import Versions
from fedge.server.machine import Federation, Stop
from fedge.server.machine.events import Record
from tests.coordinator_fixture import LIMITS, initial, plan

CLIENTS = 3
VERSIONS = 6
POINTS: dict[str, tuple[Any, str, str]] = {
    "before-row": (Journal, "append", "before"),
    "after-row": (Journal, "append", "after"),
    "after-file": (spool, "sync_folder", "after"),
    "after-arrival": (Run, "handle", "after"),
    "before-publish": (Versions, "publish", "before"),
    "after-publish": (Versions, "publish", "after"),
    "before-snapshot": (Journal, "save", "before"),
    "mid-snapshot": (journal, "write", "after"),
}


def federation() -> Federation:
    limits = Limits(chunk_bytes=LIMITS.chunk_bytes, liveness_s=20.0, snapshot_updates=4)
    return plan(CLIENTS, limits=limits, stop=Stop(versions=VERSIONS))


def arm(point: str) -> None:
    name, _, count = point.partition(":")
    owner, function, when = POINTS[name]
    real: Callable[..., Any] = getattr(owner, function)
    calls = itertools.count(1)  # uploads finish in several threads at once: each call needs its own number

    def deadly(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        if call == int(count) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if call == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, function, deadly)


def main() -> None:
    folder, port, point = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if point != "never":
        arm(point)
    events = folder / "events.jsonl"
    folder.mkdir(exist_ok=True)
    whole = [
        line for line in (events.read_bytes() if events.exists() else b"").splitlines(True) if line.endswith(b"\n")
    ]
    with events.open("wb", buffering=0) as file:
        file.writelines(whole)

        def on_record(record: Record) -> None:
            file.write(json.dumps([record.t, record.kind, record.values]).encode() + b"\n")

        machine = asyncio.run(
            serve(
                federation(),
                initial(),
                listen=f"127.0.0.1:{port}",
                state_dir=folder / "state",
                on_record=on_record,
                recorded=len(whole),
                keep_all=True,
            )
        )
    (folder / "final").write_bytes(machine.broadcast.vector.tobytes())


if __name__ == "__main__":
    main()
