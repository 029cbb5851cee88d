"""Where a rank's time goes: products by name, exchanges, waiting for blocks, attention and pointwise work, the rest.

Owns the clocks around what a rank calls. They cost about a microsecond each, so a profiled run's speed is not the one
to tell. Must never change what is computed.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from fedge.edge.llm.ranks import rank as ranks
from fedge.edge.llm.ranks.attention import Attention


class Clock:
    """Seconds by name: that pass, and in which this thread computes. Of other programs' work only the first tells."""

    def __init__(self) -> None:
        self._passed: dict[str, float] = defaultdict(float)
        self._worked: dict[str, float] = defaultdict(float)
        self._begun = 0.0, 0.0

    def start(self) -> None:
        """Forget all, and begin."""
        self._passed.clear()
        self._worked.clear()
        self._begun = time.perf_counter(), time.thread_time()

    def stop(self, tokens: int) -> dict[str, tuple[float, float]]:
        """Both, per token, by name; "rest" is what nothing else was. Empty where nothing was timed."""
        if not self._passed:
            return {}
        rest = time.perf_counter() - self._begun[0] - sum(self._passed.values())
        rest_worked = time.thread_time() - self._begun[1] - sum(self._worked.values())
        found = {name: (self._passed[name] / tokens, self._worked[name] / tokens) for name in self._passed}
        return found | {"rest": (rest / tokens, rest_worked / tokens)}

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, timed."""

        def run(*given: Any) -> Any:
            begun, worked = time.perf_counter(), time.thread_time()
            result = work(*given)
            self._worked[name] += time.thread_time() - worked
            self._passed[name] += time.perf_counter() - begun
            return result

        return run

    def mesh(self, mesh: Any) -> Any:
        """A mesh whose exchanges are timed, and with it the rank's own functions, for as long as the process lives."""
        return _Mesh(mesh, self)


class Timed:
    """Blocks whose linear maps are timed. See `resident.Resident`."""

    def __init__(self, blocks: Any, clock: Clock) -> None:
        self._clock = clock
        self._take = clock.timed("block", blocks.take)
        self.release, self.close = blocks.release, blocks.close
        for name in ("rms_norm", "gate", "tables"):
            setattr(ranks, name, clock.timed("pointwise", getattr(ranks, name)))
        Attention.attend = clock.timed("attention", Attention.attend)  # type: ignore[method-assign]

    def take(self, index: int) -> dict[str, Any]:
        """The block's arrays and timed maps."""
        found = self._take(index)
        return {name: self._clock.timed(name, one) if callable(one) else one for name, one in found.items()}


class _Mesh:
    def __init__(self, mesh: Any, clock: Clock) -> None:
        self.rank, self.size = mesh.rank, mesh.size
        self.allreduce = clock.timed("exchange", mesh.allreduce)
        self.send_step = clock.timed("send", mesh.send_step)
        self.receive_step, self.close = mesh.receive_step, mesh.close
