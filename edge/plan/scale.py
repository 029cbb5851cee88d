"""How far observed times lie from the profile: a device that gets hot, a cloud that others use.

One factor for each side, explicit state. Must never change a profile.
"""

import math
from dataclasses import dataclass, replace

WEIGHT = 0.2  # of one observation
MOST = 8.0  # times too slow, or too fast, that one observation may say: a single hiccup moves a factor by half


@dataclass(frozen=True, slots=True)
class Scale:
    """Observed over profiled seconds on the device and in the cloud; 1 is as profiled."""

    device: float = 1.0
    cloud: float = 1.0


AS_PROFILED = Scale()


def device_took(scale: Scale, observed_s: float, profiled_s: float) -> Scale:
    """The device has computed for `observed_s` what its profile says takes `profiled_s`."""
    return replace(scale, device=_moved(scale.device, observed_s, profiled_s))


def cloud_took(scale: Scale, observed_s: float, profiled_s: float) -> Scale:
    """The cloud says that it spent `observed_s`, queue and all, on what its profile says takes `profiled_s`."""
    return replace(scale, cloud=_moved(scale.cloud, observed_s, profiled_s))


def _moved(factor: float, observed_s: float, profiled_s: float) -> float:
    """A moving mean of the logarithm: twice too slow and twice too fast cancel. What is no time changes nothing."""
    if not (0 < observed_s < math.inf and 0 < profiled_s < math.inf):
        return factor
    off = math.log(observed_s) - math.log(profiled_s) - math.log(factor)
    return factor * math.exp(WEIGHT * min(max(off, -math.log(MOST)), math.log(MOST)))
