"""A coordinator, or a bare gRPC server, as a process of its own, for the coordinator benchmark.

Run as `python -m benchmarks.coordinator_process PLAN`, PLAN being JSON. It prints JSON lines: its memory before there
is a model, the address once it listens, and at the end the times (seconds) at which versions were aggregated.
The bare server takes the same client stream in the same chunks and does nothing with it: the floor.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from fedge.core.limits import Limits
from fedge.core.params import Layout
from fedge.protos import fedge_pb2 as pb
from fedge.protos.fedge_pb2_grpc import CoordinatorServicer, add_CoordinatorServicer_to_server
from fedge.server.coordinator import serve
from fedge.server.machine import Federation, Stop
from fedge.server.machine.events import Record
from fedge.strategies import aggregators
from fedge.strategies.optimizers import OPTIMIZERS
from fedge.strategies.schedulers import SCHEDULERS
from fedge.strategies.weighers import STALENESS, WEIGHERS

KINDS = ("RssAnon", "RssFile", "VmHWM")


def memory_of(process: int | str = "self") -> dict[str, int]:
    """Bytes of a process: anonymous, of mapped files, and the peak of all resident memory."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {kind: int(fields[kind].split()[0]) * 1024 for kind in KINDS}


def say(**line: Any) -> None:
    """One line to the parent."""
    print(json.dumps(line), flush=True)


async def coordinate(clients: int, size: int, versions: int, state: str, liveness_s: float = 30.0) -> None:
    """One run of FedAvg, with its journal, until so many versions are out."""
    layout = Layout(("parameters",), ((size,),), size)
    federation = Federation(
        layout=layout,
        scheduler=SCHEDULERS.build({"kind": "fedavg", "steps": 1}),
        share=WEIGHERS.build({"kind": "examples"}),
        staleness=STALENESS.build({"kind": "constant"}),
        aggregator=aggregators.build({"kind": "mean"}),
        optimizer=OPTIMIZERS.build({"kind": "sgd"}),
        expected=clients,
        stop=Stop(versions=versions),
        limits=Limits(liveness_s=liveness_s),
    )
    moments: list[float] = []

    def note(record: Record) -> None:
        if record.kind == "aggregated":
            moments.append(record.t)

    await serve(
        federation,
        np.ones(size, np.float32),  # not zeros: those take no memory
        listen="127.0.0.1:0",
        state_dir=Path(state),
        on_record=note,
        on_listening=lambda address: say(address=address),
    )
    say(aggregated_s=moments)


class Sink(CoordinatorServicer):
    """Takes uploads and forgets them."""

    async def Upload(self, parts: AsyncIterator[pb.UploadPart], _: Any) -> pb.UploadReply:  # noqa: N802 -- as in fedge.proto
        """Nothing is written, hashed or kept."""
        async for _ in parts:
            pass
        return pb.UploadReply()


async def sink() -> None:
    """For ever."""
    server = grpc.aio.server()
    add_CoordinatorServicer_to_server(Sink(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    say(address=f"127.0.0.1:{port}")
    await server.wait_for_termination()


def main() -> None:
    plan = json.loads(sys.argv[1])
    say(memory=memory_of())
    asyncio.run(coordinate(**plan) if plan else sink())


if __name__ == "__main__":
    main()
