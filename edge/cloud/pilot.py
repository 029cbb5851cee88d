"""What the device does next: the plan, revised between requests while the link changes.

Without a usable line the choice is among what needs none. A choice is only made public once its pieces are open, so
that no request waits for one to load. Must never run a sample.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from fedge.core.errors import ExperimentError, FedgeError
from fedge.edge.bundle import INPUT, Bundle
from fedge.edge.cloud.device import Device
from fedge.edge.cloud.uplink import Uplink
from fedge.edge.plan import options as choices
from fedge.edge.plan import replan
from fedge.edge.plan.link import OFFLINE, Link
from fedge.edge.plan.options import Option
from fedge.edge.plan.planner import Bounds, plan
from fedge.edge.plan.profile import Profile
from fedge.edge.plan.replan import Replanner
from fedge.edge.plan.scale import Scale

log = logging.getLogger("fedge")
PERIOD_S = 0.1  # between two looks at the link
PERFECT = Link(math.inf, 0.0)  # what no option keeps on this one, no option ever keeps


class Pilot:
    """Keeps `choice` up to date in a thread of its own. Raises DataError for a device profile of another bundle.

    `trouble` is what the last plan with the cloud found impossible, whatever the link: bounds, or the cloud's profile.
    Bounds that no local option keeps are not kept without a cloud: a poorer answer is better than none.
    """

    def __init__(self, bundle: Bundle, device: Device, bounds: Bounds, uplink: Uplink | None) -> None:
        self._bundle, self._device, self._bounds, self._uplink = bundle, device, bounds, uplink
        self._planned_for: Profile | None = None
        self._replanner: Replanner | None = None
        self._seen: tuple[Link, Scale] | None = None
        local = choices.build(bundle, device.profile, None)
        self._local = replan.best(local, OFFLINE, replace(bounds, accuracy=None, memory_bytes=None))
        self.choice = self._local
        self.trouble: FedgeError | None = None
        self._ready(self._local)
        self.planned = threading.Event()  # set once a plan has been made for the cloud and its link
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pilot", daemon=True)
        self._thread.start()

    def cloud_took(self, option: Option, observed_s: float) -> None:
        """The cloud says that it spent so long on a request of this option."""
        self._device.took("cloud", observed_s, option.decode_s + option.tail_s)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while self._uplink and not self._closed.wait(PERIOD_S):
            try:
                self._step(self._uplink, time.monotonic())
            except FedgeError as error:
                if str(error) != str(self.trouble):
                    log.warning("planning goes on without the cloud: %s", error)
                self.choice, self._planned_for, self.trouble = self._local, None, error
                self._closed.wait(10 * PERIOD_S)

    def _step(self, uplink: Uplink, now: float) -> None:
        uplink.tend(now)
        link = uplink.link()
        if not uplink.usable or link is None or uplink.profile is None:
            self.choice = self._local
            return
        if self._replanner is None or uplink.profile is not self._planned_for:
            self._replanner, self._planned_for = self._afresh(uplink.profile, link), uplink.profile
            self._device.scale = replace(self._device.scale, cloud=1.0)  # what was seen was of another profile
        elif (link, self._device.scale) != self._seen:  # the same news again is no further evidence
            self._replanner = replan.step(self._replanner, link, self._device.scale)
        self._seen = (link, self._device.scale)
        if self._replanner.choice is not self.choice:
            self._ready(self._replanner.choice)
            log.info("from now on: %s", self._replanner.choice.name)
            self.choice = self._replanner.choice
        self.planned.set()

    def _afresh(self, cloud: Profile, link: Link) -> Replanner:
        options = choices.build(self._bundle, self._device.profile, cloud)
        impossible = _impossible(options, self._bounds)
        replanner = replan.start(options, link, self._bounds)
        self.trouble = impossible
        return replanner

    def _ready(self, option: Option) -> None:
        """Open what this option runs, and what answers in its stead: more than the bound on memory counts."""
        starts = {leg[0] for leg in option.pieces} | {option.boundary or INPUT}
        onward = [leg for start in starts for leg in self._device.onward(start)]
        self._device.keep([*option.pieces, *self._local.pieces, *onward])


def _impossible(options: Sequence[Option], bounds: Bounds) -> ExperimentError | None:
    """Why no option keeps all bounds, not even on a perfect link; None where one does."""
    try:
        plan(options, PERFECT, bounds)
    except ExperimentError as error:
        return error
    return None
