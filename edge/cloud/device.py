"""The device's pieces, and one sample on its way through them.

Owns which pieces are open and how long each is expected to take. Must never know of a cloud.
"""

import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fedge.core.errors import DataError
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, OUTPUT, Bundle, Exit
from fedge.edge.exits.rules import decide
from fedge.edge.plan.profile import Profile, piece_key
from fedge.edge.plan.scale import Scale, cloud_took, device_took
from fedge.edge.runtime.sessions import Runner, open_piece

Leg = tuple[str, str]  # the piece between two boundaries
MARGIN, MARGIN_S = 1.25, 1e-3  # what predictions may be off: a factor, and the scheduler
FRESH_S, HALF_LIFE_S = 2.0, 2.0  # a factor of `scale` is believed so long after a run, then goes back to 1 this fast
RETRY_S = 0.1  # after the last run what only looks too slow is tried again; twice as long after each try in vain


@dataclass(slots=True)
class Walk:
    """Where one sample, or a batch of `rows`, is: the tensors at `boundary`, and the logits of exits passed so far."""

    boundary: str
    tensors: Mapping[str, Array]
    rows: int = 1
    passed: list[Exit] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)


class Device:
    """The pieces of one bundle on this machine. `profile` may be replaced by one that knows more."""

    def __init__(self, folder: Path, bundle: Bundle, threads: int) -> None:
        self._folder, self._bundle, self._threads = folder, bundle, threads
        self._exits = {leave.name: leave for leave in bundle.exits}
        self._legs = {(piece.start, piece.end) for piece in bundle.pieces}
        self._runners: dict[Leg, Runner] = {}
        self._opening = threading.Lock()
        self.profile = Profile("device", bundle.version, threads)
        self.scale = Scale()
        self._fresh_until = {"device": time.monotonic(), "cloud": time.monotonic()}
        self._ran_at, self._rest_s = -math.inf, RETRY_S

    def took(self, side: str, observed_s: float, profiled_s: float) -> None:
        """`device` or `cloud` took so long for what is profiled so."""
        step = device_took if side == "device" else cloud_took
        self.scale = step(self.scale, observed_s, profiled_s)
        self._fresh_until[side] = time.monotonic() + FRESH_S

    def forget(self, now: float) -> None:
        """Let what was observed long ago count less.

        What looks too slow is not run, and what is not run is not observed: without this one busy spell would last
        for ever.
        """
        for side, fresh_until in self._fresh_until.items():
            if now > fresh_until:
                weight = 0.5 ** ((now - fresh_until) / HALF_LIFE_S)
                self.scale = replace(self.scale, **{side: getattr(self.scale, side) ** weight})
                self._fresh_until[side] = now

    def open(self, legs: Sequence[Leg]) -> list[Runner]:
        """Have these pieces ready. Raises BadBundle."""
        with self._opening:
            for leg in legs:
                if leg not in self._runners:
                    self._runners[leg] = open_piece(self._folder, self._bundle, *leg, threads=self._threads)
            return [self._runners[leg] for leg in legs]

    def keep(self, legs: Sequence[Leg]) -> None:
        """Have these pieces ready and no others. Raises BadBundle.

        What a request is running at this moment goes when it is done.
        """
        self.open(legs)
        with self._opening:
            self._runners = {leg: self._runners[leg] for leg in legs}

    def close(self) -> None:
        """Give the memory back."""
        with self._opening:
            for runner in self._runners.values():
                runner.close()
            self._runners.clear()

    def onward(self, boundary: str) -> list[Leg]:
        """The pieces from a boundary through all later exits to the output; those that are there."""
        order = [one.name for one in self._bundle.boundaries]
        stops = [leave.boundary for leave in self._bundle.exits]
        stops = sorted(
            {stop for stop in stops if order.index(stop) > order.index(boundary)} | {OUTPUT}, key=order.index
        )
        legs = []
        for stop in stops:
            if (boundary, stop) in self._legs and boundary != stop:
                legs.append((boundary, stop))
                boundary = stop
        return legs

    def takes_s(self, legs: Sequence[Leg]) -> float:
        """How long these pieces may take, with a margin; what was never measured counts as nothing."""
        known = sum(self.profile.pieces.get(piece_key(*leg), 0.0) for leg in legs)
        return (MARGIN * self.scale.device * known + MARGIN_S) if legs else 0.0

    def advance(self, walk: Walk, leg: Leg) -> list[Exit]:
        """Compute one piece; the exits that were passed. Raises RefusedTensor, BadBundle."""
        (runner,) = self.open([leg])
        began_at = time.perf_counter()
        found = runner.run(walk.tensors)
        self._ran_at = time.monotonic()
        if walk.rows == 1:  # profiles are for one sample
            known_s = self.profile.pieces.get(piece_key(*leg), 0.0)
            self.took("device", time.perf_counter() - began_at, known_s)
        walk.boundary = leg[1]
        walk.tensors = {tensor.name: found[tensor.name] for tensor in self._bundle.boundary(leg[1]).tensors}
        fresh = [self._exits[name] for name in runner.piece.exits if self._exits[name] not in walk.passed]
        walk.passed += fresh
        walk.logits += [found[leave.logits.name] for leave in fresh]
        return fresh

    def retry(self, walk: Walk, leg: Leg, due_at: float) -> bool:
        """Compute one piece that looks too slow, where as profiled it would be in time; whether it was tried.

        Not at once after another run, and seldom while tries end late: a busy device has better to do. It tells
        whether a busy spell has passed, so it counts for all runs before it. Raises as `advance`.
        """
        now, known_s = time.monotonic(), walk.rows * self.profile.pieces.get(piece_key(*leg), 0.0)
        if now - self._ran_at < self._rest_s or now + MARGIN * known_s + MARGIN_S > due_at:
            return False
        self.advance(walk, leg)
        if known_s:
            self.scale = replace(self.scale, device=(self._ran_at - now) / known_s)
        self._rest_s = RETRY_S if self._ran_at <= due_at else min(2 * self._rest_s, FRESH_S)
        return True

    def leaves(self, walk: Walk, fresh: Sequence[Exit], used: Sequence[str]) -> Exit | None:
        """The exit among the `fresh` ones, if `used`, that answers all samples; none whose logits are no numbers."""
        for leave in fresh:
            if leave.name not in used:
                continue
            history = walk.logits[: walk.passed.index(leave) + 1]
            with contextlib.suppress(DataError):
                if np.all(decide(self._bundle.rule, history, leave.temperature, leave.threshold)):
                    return leave
        return None


def start(bundle: Bundle, array: Array) -> Walk:
    """A sample, or a batch where the model takes one, at the input."""
    (tensor, *_) = bundle.boundary(INPUT).tensors
    return Walk(INPUT, {tensor.name: array}, array.shape[0] if tensor.shape[:1] == (-1,) else 1)
