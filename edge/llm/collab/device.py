"""The device's half of a model, opened and at work, with a line to its cloud if it has one.

Owns the order in which parts are opened and closed. Must never decode.
"""

import contextlib
from collections.abc import Iterator

from fedge.core.limits import LlmLimits
from fedge.edge.llm.collab.decoder import Decoder, Settings
from fedge.edge.llm.collab.halves import Halves
from fedge.edge.llm.collab.segments import Segments
from fedge.edge.llm.collab.uplink import Uplink
from fedge.edge.llm.collab.wire import Coding
from fedge.edge.llm.compute.choice import kernel_for
from fedge.edge.llm.compute.resident import Resident
from fedge.edge.llm.mesh.security import Ticket


@contextlib.contextmanager
def device(
    halves: Halves,
    cloud: str | None,
    settings: Settings,
    *,
    coding: Coding = "f16",
    ticket: Ticket | None = None,
    context: int | None = None,
    kernel: str | None = None,
    wait_s: float = 0.0,
    limits: LlmLimits = LlmLimits(),
) -> Iterator[Decoder]:
    """A decoder for `settings`, with the cloud at address `cloud` (None: alone), which may come later.

    It is waited for at most `wait_s`. `context`: tokens of a prompt and its answer, None for as many as the model can.
    `kernel` None: the fastest of those that compute a row as if it were alone, as in the cloud. Raises ModelError,
    AddressError, and ExperimentError for settings that cannot work, as another machine's cloud without a `ticket`.
    """
    shards, found = halves.edge(limits)
    fastest = kernel_for(shards[0], kernel, limits, invariant=True)
    longest = shards[0].config.room(context)
    with contextlib.ExitStack() as opened:
        segments = Segments(
            shards,
            lambda shard: Resident(shard, fastest),
            context=longest,
            limits=limits,
        )
        opened.callback(segments.close)
        uplink = None
        if cloud is not None and settings.mode != "standalone":
            uplink = Uplink(
                cloud,
                model=halves.model,
                layer=halves.exits[-1],
                hidden=shards[0].config.hidden,
                coding=coding,
                ticket=ticket,
                limits=limits,
            )
            opened.callback(uplink.close)
            uplink.wait(wait_s)
        yield Decoder(segments, found.exits, uplink, settings)
