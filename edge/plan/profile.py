"""What one machine needs for the parts of one bundle: seconds, bytes and memory, as measured; a file of JSON.

A device keeps its own profile and gets the cloud's at the greeting. Owns the format and its check. Must never measure.
"""

from pathlib import Path
from typing import Annotated

import msgspec

from fedge.core.errors import DataError

MOST = 1e9  # seconds or bytes of one figure: what is summed and scaled from them stays finite
Amount = Annotated[float, msgspec.Meta(ge=0, le=MOST)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class CodingCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it takes to code one boundary: seconds to encode and to decode, bytes of the real message, means."""

    encode_s: Amount
    decode_s: Amount
    bytes: Amount


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `device` measured for the bundle of this `version` with so many threads per session.

    `operators` gives (output tensor, seconds) in the order of execution; `pieces` seconds, the minimum over repeats,
    and `memory_bytes` what a session holds, both by `piece_key`; `codings` what coding costs, by `coding_key`.
    """

    device: str
    version: str
    threads: Annotated[int, msgspec.Meta(ge=1)]
    operators: tuple[tuple[str, Amount], ...] = ()
    pieces: dict[str, Amount] = {}
    codings: dict[str, CodingCost] = {}
    memory_bytes: dict[str, Bytes] = {}


def piece_key(start: str, end: str) -> str:
    """The key of a piece in a profile."""
    return f"{start}..{end}"


def coding_key(boundary: str, coding: str) -> str:
    """The key of a coding in a profile."""
    return f"{boundary} {coding}"


def encode(profile: Profile) -> bytes:
    """The profile as JSON. Raises DataError where a figure is below 0 or above MOST."""
    _check(profile)
    return msgspec.json.format(msgspec.json.encode(profile))


def decode(data: bytes) -> Profile:
    """The profile that `encode` wrote, maybe on another machine. Raises DataError where it is anything else."""
    try:
        profile = msgspec.json.decode(data, type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"This is no profile ({error}); measure the machine again with `fedge edge bench`.") from None
    _check(profile)
    return profile


def load(path: Path) -> Profile:
    """The profile in this file. Raises DataError where it cannot be read or is no profile."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"The profile {str(path)!r} cannot be read ({error}); name one that is there.") from None
    try:
        return decode(data)
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}") from None


def save(path: Path, profile: Profile) -> None:
    """Write the profile to this file. Raises DataError where it cannot be written or a figure is out of range."""
    data = encode(profile)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise DataError(f"The profile {str(path)!r} cannot be written ({error}); mend or name another place.") from None


def _check(profile: Profile) -> None:
    """Every figure in range, also where the profile was made in code."""
    figures: list[tuple[str, float]] = [*profile.operators, *profile.pieces.items()]
    for key, cost in profile.codings.items():
        figures += [(key, cost.encode_s), (key, cost.decode_s), (key, cost.bytes)]
    bounded = [(*named, MOST) for named in figures]
    bounded += [(*named, float(1 << 63)) for named in profile.memory_bytes.items()]
    for key, figure, most in bounded:
        if not 0 <= figure <= most:
            raise DataError(f"The profile's figure for {key!r} is {figure}; measure the machine again.")
