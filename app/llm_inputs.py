"""What people give the commands of `fedge llm`: kinds, devices, links and tickets, checked; and plans as plain data.

Must never guess: what does not fit is refused with a sentence.
"""

import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from fedge.core.errors import DataError, ExperimentError
from fedge.edge.llm.group.blocks import spare_bytes
from fedge.edge.llm.group.speeds import speeds
from fedge.edge.llm.mesh import security
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.shards.planner import Device, Plan
from fedge.edge.llm.shards.quant import KINDS, Kind
from fedge.edge.plan.link import Link
from fedge.llm import default_store

if TYPE_CHECKING:
    from fedge.edge.llm.collab.decoder import Settings
    from fedge.edge.llm.collab.wire import Coding

MEGABYTE = 1 << 20
MAX_MEMORY_BYTES = 1 << 50
MAX_DEVICES_BYTES = 1 << 20
MAX_TEXT_BYTES = 256 << 20
MAX_DIGITS = 6  # of a layer's number


class _Listed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One device of a list, as `fedge llm bench --json` prints it; what it says of a model is not looked at."""

    name: str
    weights_per_s: dict[str, float]
    memory_bytes: int
    disk_bytes_per_s: float
    layer_s: float = 0.0
    run: dict[str, float] = {}


def refused(sentence: str) -> ExperimentError:
    """For what is wrong with the arguments themselves."""
    return ExperimentError(sentence)


def kind(name: str) -> Kind:
    """Raises ExperimentError for a kind of weights that there is not."""
    for one in KINDS:
        if one == name:
            return one
    raise ExperimentError(f"There is no kind {name!r}; choose one of {', '.join(KINDS)}.")


def memory(megabytes: float | None) -> int | None:
    """Bytes; None where nobody named a number. Raises ExperimentError for what no machine has, 0 among it."""
    if megabytes is None:
        return None
    if not 1 <= megabytes * MEGABYTE <= MAX_MEMORY_BYTES:  # NaN is refused too
        raise ExperimentError(f"{megabytes:g} MB is no memory that a machine can give; name a number above 0.")
    return int(megabytes * MEGABYTE)


def device_name(name: str) -> str:
    """Raises ExperimentError for what cannot also name a folder of shards."""
    if name in (".", "..") or not name.isprintable() or set(name) & {"/", "\\"}:
        raise ExperimentError(f"{name!r} cannot be a device's name; use letters, digits and dashes.")
    return name


def numbers(text: str) -> list[float]:
    """Positive numbers between commas; none for an empty text. Raises ExperimentError."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(0 < one < math.inf for one in found):
        raise ExperimentError(f"{text!r} are no speeds; write positive numbers with commas between, such as 3,1.")
    return found


def link(bandwidth_mbps: float, rtt_ms: float) -> Link:
    """Raises ExperimentError for a link that is none."""
    return Link(bandwidth_bps=bandwidth_mbps * 1e6, rtt_s=rtt_ms / 1e3)


def this_device(store: Path | None) -> dict[str, Any]:
    """This machine as one entry of a list of devices; measured, unless that is known in `store`."""
    place = store or default_store()
    place.mkdir(parents=True, exist_ok=True)
    known = speeds(place)
    return {
        "name": platform.node() or "this",
        "weights_per_s": dict(known.weights_per_s),
        "memory_bytes": spare_bytes(),
        "disk_bytes_per_s": known.disk_bytes_per_s,
        "layer_s": known.layer_s,
    }


def devices(path: Path | None, ranks: int, chosen: Kind, memory_bytes: int | None) -> list[Device]:
    """Those of the file, or `ranks` like this machine, the first of which holds the prompt. Raises ExperimentError."""
    if path is not None:
        return [_device(one, chosen, memory_bytes) for one in _listed(path)]
    one = msgspec.convert(this_device(None), _Listed)
    room = memory_bytes or one.memory_bytes // ranks
    return [_device(msgspec.structs.replace(one, name=f"rank-{n}"), chosen, room) for n in range(ranks)]


def plan_as_json(found: Plan) -> dict[str, Any]:
    """All options, and which one is chosen."""
    return {"choice": found.options.index(found.choice), "options": [asdict(option) for option in found.options]}


def layers(named: str) -> tuple[int, ...]:
    """Whole numbers between commas. Raises ExperimentError."""
    parts = [part.strip() for part in named.split(",")]
    if not all(part.isdecimal() and len(part) < MAX_DIGITS for part in parts):
        raise ExperimentError(f"{named!r} are no layers; write whole numbers with commas between, such as 3,5.")
    return tuple(map(int, parts))


def text(path: Path | None) -> str:
    """What is to be learnt from, or nothing. Raises DataError for a file that is too long or no text."""
    if path is None:
        return ""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise DataError(f"{path} is longer than {MAX_TEXT_BYTES >> 20} MiB; give a part of it.")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no text file that can be read ({error}); name one in UTF-8.") from None


def settings(mode: str, threshold: float | None, deadline_s: float) -> "Settings":
    """How a device answers. Raises ExperimentError."""
    from fedge.edge.llm.collab.decoder import Settings

    return Settings(cast("Any", mode), threshold, deadline_s)


def coding(named: str) -> "Coding":
    """Raises ExperimentError for a coding that there is not."""
    from fedge.edge.llm.collab.wire import CODINGS

    for one in CODINGS:
        if one == named:
            return one
    raise ExperimentError(f"There is no coding {named!r}; choose one of {', '.join(CODINGS)}.")


def stages() -> Callable[[str, float], None]:
    """What is going on, on standard error: in a terminal with its share, else a line for each new thing."""
    last = ""

    def show(what: str, share: float) -> None:
        nonlocal last
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{what} {100 * share:.0f} %\033[K" + ("\n" if share >= 1 else ""))
        elif what != last:
            sys.stderr.write(f"{what}\n")
        last = what

    return show


def make_ticket(folder: Path | None) -> tuple[Ticket | None, str]:
    """The ticket in `folder` and the key of its certificate, made if need be."""
    if folder is None:
        return None, ""
    return security.read_ticket(security.make_ticket(folder)), security.read_key(folder)


def read_ticket(path: Path | None) -> Ticket | None:
    """Raises ExperimentError where the file is no ticket."""
    return None if path is None else security.read_ticket(path)


def progress(what: str) -> Callable[[int, int], None]:
    """A line on standard error that counts up, in a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{what} {100 * done // max(total, 1)} %" + ("\n" if done >= total else ""))

    return show


def _listed(path: Path) -> Sequence[_Listed]:
    try:
        if path.stat().st_size > MAX_DEVICES_BYTES:
            raise ExperimentError(f"{path} is too long for a list of devices; name another file.")
        found: _Listed | list[_Listed] = msgspec.json.decode(path.read_bytes(), type=_Listed | list[_Listed])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ExperimentError(
            f"{path} is no list of devices ({error!s:.200}); write what `fedge llm bench --json` prints, or a list."
        ) from None
    if isinstance(found, _Listed):
        return [found]
    if not found:
        raise ExperimentError(f"{path} lists no device; write at least the one that holds the prompt.")
    return found


def _device(one: _Listed, chosen: Kind, memory_bytes: int | None) -> Device:
    rate = one.weights_per_s.get(chosen, 0.0)
    if not (rate > 0 and one.disk_bytes_per_s > 0 and one.memory_bytes > 0 and one.layer_s >= 0):
        raise ExperimentError(f"The device {one.name!r} has no speed for {chosen}, or one that is none; measure it.")
    return Device(one.name, rate, memory_bytes or one.memory_bytes, one.disk_bytes_per_s, one.layer_s)
