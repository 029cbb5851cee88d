"""One request on its way: the device's part, the cloud's, and what answers where the cloud does not.

Must never plan, and never raise for the network's sake.
"""

import time
from collections.abc import Mapping
from concurrent.futures import TimeoutError as NoReply
from dataclasses import dataclass

from fedge.core.errors import AddressError, FedgeError, RefusedTensor, TooLate
from fedge.core.limits import EdgeLimits
from fedge.core.params import Array
from fedge.edge.bundle import OUTPUT, Bundle
from fedge.edge.cloud.device import Device, Walk
from fedge.edge.cloud.pilot import Pilot
from fedge.edge.cloud.uplink import Uplink
from fedge.edge.cloud.wire import BATCH, Reply, batch_rows
from fedge.edge.coding.codings import decode, encode
from fedge.edge.exits.rules import sound
from fedge.edge.plan.options import Option

CLOUD, DEVICE, EXIT, NONE = "cloud", "device", "exit:", "none"  # labels; that of an exit ends with its name
PATIENCE = 2.0  # times what the reply should take: less the cloud does not get for the sake of a later answer here
WAKE_S, WAKE_SHARE = 0.01, 0.05  # what a thread may oversleep: so much, and at most this share of the time left


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outputs by name, who gave them, and why it was not who should have."""

    outputs: Mapping[str, Array]
    label: str
    why: FedgeError | None = None


@dataclass(frozen=True, slots=True)
class Ends:
    """What all requests of a session share."""

    bundle: Bundle
    device: Device
    pilot: Pilot
    uplink: Uplink | None
    limits: EdgeLimits


def answer(ends: Ends, option: Option, walk: Walk, due_at: float) -> Outcome:
    """Follow `option`, and what is possible where that fails. Raises RefusedTensor where a piece cannot compute."""
    ends.device.forget(time.monotonic())
    for leg in option.pieces:
        if time.monotonic() + walk.rows * ends.device.takes_s([leg]) > due_at:
            late = TooLate(f"The device would not be done with {leg[1]!r} by the deadline; allow more time.")
            return _alone(ends, walk, due_at, late)
        fresh = ends.device.advance(walk, leg)
        leave = ends.device.leaves(walk, fresh, option.exits)
        if leave is not None:
            return Outcome({leave.logits.name: walk.logits[walk.passed.index(leave)]}, EXIT + leave.name)
    if option.boundary is None:
        return _whole(walk)
    try:
        return Outcome(_asked(ends, option, walk, due_at), CLOUD)
    except FedgeError as error:
        return _alone(ends, walk, due_at, error)


def _asked(ends: Ends, option: Option, walk: Walk, due_at: float) -> dict[str, Array]:
    """The cloud's outputs. Raises what it refused with, AddressError where it is gone, TooLate at the last moment."""
    if ends.uplink is None or option.coding is None:
        raise AddressError("There is no cloud.")
    shapes = [tensor.shape for tensor in walk.tensors.values()]
    batch_rows(shapes, ends.bundle.boundary(walk.boundary).tensors, ends.limits)
    coded = [encode(name, tensor, option.coding) for name, tensor in walk.tensors.items()]
    wait_s = due_at - time.monotonic() - reserved_s(ends, option, walk, due_at - time.monotonic())
    if wait_s <= 0:
        raise TooLate("No time was left to ask the cloud; allow more, or plan with a cut further on.")
    future = ends.uplink.ask(walk.boundary, coded, wait_s)
    try:
        reply = future.result(wait_s)
    except NoReply:
        ends.uplink.tend(time.monotonic())
        raise TooLate(f"The cloud had not answered after {wait_s:.3f} s, the last moment for the device.") from None
    if walk.rows == 1:
        ends.pilot.cloud_took(option, reply.cloud_s)
    return _outputs(ends, reply, walk.rows)


def reserved_s(ends: Ends, option: Option, walk: Walk, left_s: float) -> float:
    """How much of the time left the device keeps for itself while the cloud is asked.

    Enough for the deepest answer of its own that still leaves the cloud PATIENCE times what its reply should take; if
    there is none, for the next answer; if that cannot be in time anyway, none. And some to wake up.
    """
    wake_s = min(WAKE_S, WAKE_SHARE * left_s)
    legs = ends.device.onward(walk.boundary)
    needs = [walk.rows * ends.device.takes_s(legs[:count]) for count in range(len(legs), 0, -1)]
    needs = [need for need in (*needs, *([0.0] if walk.passed else [])) if need + wake_s < left_s]
    link = ends.uplink.link() if ends.uplink else None
    scale = ends.device.scale
    expected_s = option.longest_s(link, scale) - scale.device * option.worst_s if link else 0.0
    patient = [need for need in needs if left_s - wake_s - need >= PATIENCE * walk.rows * expected_s]
    return wake_s + (patient[0] if patient else min(needs, default=0.0))


def _outputs(ends: Ends, reply: Reply, rows: int) -> dict[str, Array]:
    """The tensors in a reply. Raises RefusedTensor where they are not the model's for a batch of so many rows.

    What is not `sound` is no answer: either the cloud has failed, or the device will find the same.
    """
    tensors = ends.bundle.boundary(OUTPUT).tensors
    if len(reply.outputs) != len(tensors):
        raise RefusedTensor(f"The cloud sent {len(reply.outputs)} outputs, the model has {len(tensors)}.")
    outputs = {tensor.name: decode(coded, tensor, ends.limits) for tensor, coded in zip(tensors, reply.outputs)}
    for tensor in tensors:
        if tensor.shape[:1] == (BATCH,) and outputs[tensor.name].shape[0] != rows:
            raise RefusedTensor(f"The cloud sent {outputs[tensor.name].shape[0]} rows of {tensor.name!r} for {rows}.")
        if not sound(outputs[tensor.name]):
            raise RefusedTensor(f"The cloud sent values of {tensor.name!r} that are NaN or infinite; look at its tail.")
    return outputs


def _whole(walk: Walk, why: FedgeError | None = None) -> Outcome:
    """The whole model's answer on the device. It stands even where it is not `sound`, for nobody knows better."""
    wrong = [name for name, values in walk.tensors.items() if not sound(values)]
    if wrong and why is None:
        why = RefusedTensor(f"The model's own {wrong[0]!r} has values that are NaN or infinite; look at its input.")
    return Outcome(walk.tensors, DEVICE, why)


def _alone(ends: Ends, walk: Walk, due_at: float, why: FedgeError) -> Outcome:
    """As far as the device gets by the deadline, by itself; where that is nowhere, it may try."""
    for leg in ends.device.onward(walk.boundary):
        if time.monotonic() + walk.rows * ends.device.takes_s([leg]) <= due_at:
            ends.device.advance(walk, leg)
        elif walk.passed or not ends.device.retry(walk, leg, due_at):
            break
    if walk.boundary == OUTPUT:
        return _whole(walk, why)
    for leave, logits in zip(reversed(walk.passed), reversed(walk.logits)):
        if sound(logits):
            return Outcome({leave.logits.name: logits}, EXIT + leave.name, why)
    return Outcome({}, NONE, TooLate(f"Nothing could answer by the deadline ({why})"))
