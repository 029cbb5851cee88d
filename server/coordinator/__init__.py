"""The machine's shell over gRPC: journal, spool, clock and sessions around it, and `serve`, which runs it all."""

from fedge.server.coordinator.replay import replay
from fedge.server.coordinator.serving import serve

__all__ = ["replay", "serve"]
