"""A shard from the head to a worker's folder, going on where it was cut.

Owns the tries. Must never open a shard.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc

from fedge.core.errors import DataError, ModelError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group.store import Store
from fedge.protos import llm_pb2 as pb

log = logging.getLogger("fedge")
Fetch = Callable[[pb.FetchRequest], Any]  # gRPC's call: an iterator of chunks that can be cancelled


def download(store: Store, fetch: Fetch, digest: str, size: int, stopping: threading.Event, limits: LlmLimits) -> Path:
    """The shard's file, whose bytes are right. Raises ModelError where it does not come, RankLost when stopped."""
    last = ""
    for _ in range(limits.fetch_tries):
        path = store.whole(digest)
        if path is not None:
            return path
        if stopping.is_set():
            raise RankLost("The epoch ended before the shard was there.")
        call = fetch(pb.FetchRequest(digest=digest, offset=store.fetched(digest)))
        try:
            return store.fetch(digest, size, _chunks(call, stopping))
        except grpc.RpcError as error:
            last = f"{error.code().name}: {error.details()}"
        except DataError as error:
            last = str(error)
        finally:
            call.cancel()
        log.warning("A shard has not come whole (%s); trying again", last)
        stopping.wait(limits.reconnect_s)
    raise ModelError(f"A shard could not be fetched ({last:.200}); see that its link is steady.")


def _chunks(call: Any, stopping: threading.Event) -> Iterator[bytes]:
    for chunk in call:
        if stopping.is_set():
            raise RankLost("The epoch ended before the shard was there.")
        yield chunk.data
