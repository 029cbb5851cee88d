"""The device runtime: data sets and partitions, trainers, and the loop that fetches tasks and sends updates.

Never imports `fedge.server`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedge.client.script import connect as connect


def __getattr__(name: str) -> Any:
    """`connect` on first use, so that data sets and trainers load without gRPC."""
    if name == "connect":
        from fedge.client.script import connect

        return connect
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
