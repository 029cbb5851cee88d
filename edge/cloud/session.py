"""One answer per input, by its deadline, whatever the network does.

A request runs the device's part of the plan; an exit on the way may answer; else the cloud is asked, and given until
the last moment at which the device can still answer by itself. Where the cloud is late, gone or refuses, the device
goes on: to the end, or to the next exit, or back to the best exit it has passed. The answer says which and why.
Must never raise for the network's sake.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from fedge.core.errors import ExperimentError, FedgeError, ModelError
from fedge.core.limits import EdgeLimits
from fedge.core.params import Array
from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, Bundle
from fedge.edge.cloud import request
from fedge.edge.cloud.device import Device, start
from fedge.edge.cloud.pilot import Pilot
from fedge.edge.cloud.uplink import Uplink
from fedge.edge.plan.link import Link
from fedge.edge.plan.options import Option
from fedge.edge.plan.planner import Bounds, check_memory
from fedge.edge.plan.profile import Profile
from fedge.edge.runtime.measure import profile_roughly
from fedge.edge.runtime.tensors import check


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out. `outputs` are those of the model by name, or the logits of the exit; empty for the label `none`.

    `label` is `cloud`, `device`, `exit:NAME` or `none`. `option` names the plan that was followed; `reason` is empty
    where it went to plan, else the code of what went wrong (docs/errors.md), and `detail` says it in a sentence; where
    no plan with the cloud can keep the bounds, every answer says so. `late`: it came after its deadline.
    """

    outputs: Mapping[str, Array]
    label: str
    option: str
    version: str
    latency_s: float
    late: bool
    reason: str = ""
    detail: str = ""

    @property
    def output(self) -> Array | None:
        """The first output, or None."""
        return next(iter(self.outputs.values()), None)


class Session:
    """Inference with the bundle in `folder`, at most `deadline_s` seconds each, with the help of the tail at `cloud`.

    `profile` is what this device measured; without one pieces and codings are timed roughly now. One request runs at a
    time; calls from several threads wait for each other. The bound on memory is that of the planned pieces: those that
    answer where the cloud does not are open as well; with a cloud it needs a profile that tells memory. Raises
    BadBundle, ModelError (several inputs), ExperimentError (bounds, deadline), DataError (profile) and AddressError
    (what is no host:port; one that is not there is no error).
    """

    def __init__(
        self,
        folder: Path,
        cloud: str | None = None,
        *,
        deadline_s: float = 1.0,
        bounds: Bounds = Bounds(),
        profile: Profile | None = None,
        threads: int = 1,
        limits: EdgeLimits = EdgeLimits(),
    ) -> None:
        if not 0 < deadline_s <= limits.max_deadline_s:
            raise ExperimentError(
                f"The deadline is {deadline_s} s; give more than 0 and {limits.max_deadline_s} at most."
            )
        if cloud is not None:  # without one the bound is let go
            check_memory(profile, bounds)
        self.bundle = bundles.load(folder, limits)
        inputs = [tensor.name for tensor in self.bundle.boundary(INPUT).tensors]
        if len(inputs) != 1:
            raise ModelError(f"The model takes the inputs {inputs[:8]}, a session gives one; join them in the model.")
        self._limits, self._deadline_s = limits, deadline_s
        self._closed = False
        self._device = Device(folder, self.bundle, threads)
        self._device.profile = profile or _rough(self._device, self.bundle, threads)
        self._turn = threading.Lock()
        self._uplink = Uplink(cloud, self.bundle.version, limits) if cloud is not None else None
        try:
            self._pilot = Pilot(self.bundle, self._device, replace(bounds, deadline_s=deadline_s), self._uplink)
        except FedgeError:
            if self._uplink:
                self._uplink.close()
            raise
        self._ends = request.Ends(self.bundle, self._device, self._pilot, self._uplink, limits)

    @property
    def option(self) -> Option:
        """What the next request will try."""
        return self._pilot.choice

    @property
    def link(self) -> Link | None:
        """The link to the cloud as far as it is known; None while there is none."""
        return self._uplink.link() if self._uplink and self._uplink.usable else None

    @property
    def trouble(self) -> str:
        """The reason why the cloud cannot be asked now, or no plan with it keeps the bounds, as in docs/errors.md.

        Empty where all is well, or there is no cloud.
        """
        trouble = self._trouble()
        return trouble.reason if trouble else ""

    @property
    def trouble_detail(self) -> str:
        """The sentence of `trouble`, with its remedy; empty where all is well."""
        return str(self._trouble() or "")

    def _trouble(self) -> FedgeError | None:
        return self._uplink.trouble if self._uplink and not self._uplink.usable else self._pilot.trouble

    def wait_for_cloud(self, timeout_s: float) -> bool:
        """Wait until the cloud has been greeted and there is a plan with it; False where that takes longer."""
        return self._pilot.planned.wait(timeout_s) and self.link is not None

    def infer(self, array: Array) -> Answer:
        """The answer for one input, or a batch of them [n, ...]. Raises RefusedTensor where it does not fit the model.

        A batch leaves at an exit where all of it does. No trouble of the network is ever raised. Raises ModelError
        after `close`.
        """
        tensors = self.bundle.boundary(INPUT).tensors
        check(tensors, {tensors[0].name: array})
        began_at = time.monotonic()
        with self._turn:
            if self._closed:
                raise ModelError("The session has been closed; open another.")
            option = self._pilot.choice
            outcome = request.answer(self._ends, option, start(self.bundle, array), began_at + self._deadline_s)
        latency_s = time.monotonic() - began_at
        whys = [error for error in (outcome.why, self._pilot.trouble) if error]
        return Answer(
            outputs=outcome.outputs,
            label=outcome.label,
            option=option.name,
            version=self.bundle.version,
            latency_s=latency_s,
            late=latency_s > self._deadline_s,
            reason=whys[0].reason if whys else "",
            detail=" ".join(str(error) for error in whys),
        )

    def close(self) -> None:
        """Hang up and give the memory back, after the request that runs, if any. May be called twice."""
        with self._turn:
            self._closed = True
        self._pilot.close()
        if self._uplink:
            self._uplink.close()
        self._device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rough(device: Device, bundle: Bundle, threads: int) -> Profile:
    """This device's times where nobody has measured them: all pieces, for the planner compares all."""
    runners = device.open([(piece.start, piece.end) for piece in bundle.pieces])
    return profile_roughly(bundle, runners, device="device", threads=threads)
