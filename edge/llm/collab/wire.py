"""Messages of the service `Continue` in protos/llm.proto and what they stand for, for both ends.

Whatever bytes come in, the outcome is what they ask or tell, within the limits, or DataError. A device makes its
messages with `states` and `asked_bytes` and reads replies with `told`; the cloud reads them with `asked` and replies
with `told_bytes`. Owns the codings of states, the names of metadata, and the reasons beside those of core/errors.py.
Must never run a call or keep a session.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from fedge.core.errors import DataError
from fedge.core.limits import LlmLimits
from fedge.core.params import Array
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.mesh.control import TOKEN
from fedge.protos import llm_pb2 as pb

PROTOCOL = 1
SERVICE = "fedge.llm.v1.Continue"
CLIENT, VERSION, MODEL, LAYER = "fedge-client", "fedge-protocol", "fedge-model", "fedge-layer"  # metadata of Talk
STATES_MISSING = "STATES_MISSING"  # the cloud knows fewer positions than it must: send states from `known` on
GREEDY = Sampling(temperature=0.0)
Coding = Literal["f32", "f16", "u8"]
CODINGS: tuple[Coding, ...] = get_args(Coding)
SLACK_BYTES = 1 << 10  # of a message beside its states

_MOST_F16 = 65504.0
_MAX_NAME_BYTES = 64
_MAX_SAMPLING_BYTES = 1 << 16  # the API's 1024 biases have up to 40 each
_MAX_DETAIL = 500  # characters
_AGAIN = "install the same version of fedge on both ends"


@dataclass(frozen=True, slots=True)
class Hidden:
    """States [n, hidden], float16 or float32, of positions from `start` on. Without rows it asks what is known."""

    session: str
    start: int
    rows: Array = field(repr=False)


@dataclass(frozen=True, slots=True)
class Want:
    """Ask for the token after `position`, within `deadline_s` from the arrival of the question."""

    session: str
    id: int
    position: int
    deadline_s: float
    sampling: Sampling = GREEDY


@dataclass(frozen=True, slots=True)
class Verify:
    """Ask how many `guesses` of the tokens after `position` are right, and for the token after those."""

    session: str
    id: int
    position: int
    guesses: tuple[int, ...]
    deadline_s: float
    sampling: Sampling = GREEDY


@dataclass(frozen=True, slots=True)
class Forget:
    """The session is over."""

    session: str


Asked = Hidden | Want | Verify | Forget


@dataclass(frozen=True, slots=True)
class Told:
    """A reply: to question `id`, or to states under id 0. Without a `reason` there is a `token`, after `accepted`
    guesses; under id 0 there is none. The cloud knows the positions 0 to `known` of the session.
    """

    id: int
    session: str
    known: int = 0
    token: int = 0
    accepted: int = 0
    compute_s: float = 0.0
    reason: str = ""
    detail: str = ""


def metadata(client: str, model: str, layer: int, token: str = "") -> list[tuple[str, str]]:
    """What a device sends along with Meet and Talk. `client` is 32 random hexadecimal digits that it keeps, `token` the
    ticket's, where there is one.
    """
    return [(CLIENT, client), (VERSION, str(PROTOCOL)), (MODEL, model), (LAYER, str(layer)), (TOKEN, token)]


def states(
    session: str, start: int, x: Array, coding: Coding, max_bytes: int = LlmLimits().max_ask_bytes
) -> list[bytes]:
    """Messages of `max_bytes` at most, with states x [n, hidden] (float32 or float16) of positions from `start` on.

    Beyond the range of float16 all go as float32, whatever `coding` says. Raises DataError where a number is none. No
    rows make one message, which asks what is known.
    """
    if not np.isfinite(x).all():
        raise DataError("A state is no number; check the weights of the model.")
    if coding != "f32" and x.size and float(np.abs(x).max()) > _MOST_F16:
        coding = "f32"
    step = max(1, (max_bytes - SLACK_BYTES) // row_bytes(coding, x.shape[1]))
    found = []
    for first in range(0, max(len(x), 1), step):
        rows = x[first : first + step]
        hidden = pb.Hidden(start=start + first, count=len(rows), coding=coding, data=_encode(rows, coding))
        found.append(_bytes(pb.Ask(session=session, hidden=hidden)))
    return found


def asked_bytes(question: Want | Verify | Forget) -> bytes:
    """The message of a question. Raises DataError for numbers that do not fit into it."""
    if isinstance(question, Forget):
        return _bytes(pb.Ask(session=question.session, forget=True))
    common: dict[str, Any] = {"id": question.id, "position": question.position, "deadline_s": question.deadline_s}
    common["sampling"] = b"" if question.sampling == GREEDY else msgspec.json.encode(question.sampling)
    try:
        if isinstance(question, Want):
            return _bytes(pb.Ask(session=question.session, want=pb.Want(**common)))
        verify = pb.Verify(guesses=question.guesses, **common)
        return _bytes(pb.Ask(session=question.session, verify=verify))
    except (ValueError, TypeError) as error:
        raise DataError(f"A question cannot be sent ({error}); ask for positions and tokens that there are.") from error


def asked(data: bytes, hidden: int, limits: LlmLimits = LlmLimits()) -> Asked:
    """A device's message, for a model whose states have `hidden` numbers. Raises DataError, or ExperimentError for
    settings of sampling that are out of range.
    """
    _require(len(data) <= limits.max_ask_bytes, f"it has {len(data)} bytes")
    message = _parse(pb.Ask, data)
    session = message.session
    _require(session and session.isprintable(), "its session is empty or cannot be printed")
    _require(len(session.encode()) <= _MAX_NAME_BYTES, "the name of its session is too long")
    match message.WhichOneof("what"):
        case "hidden":
            return _hidden(session, message.hidden, hidden)
        case "want":
            want = message.want
            deadline_s = _deadline(want.deadline_s, limits)
            return Want(session, want.id, want.position, deadline_s, _sampling(want.sampling))
        case "verify":
            verify = message.verify
            _require(len(verify.guesses) <= limits.max_guesses, f"it has {len(verify.guesses)} guesses")
            deadline_s, sampling = _deadline(verify.deadline_s, limits), _sampling(verify.sampling)
            return Verify(session, verify.id, verify.position, tuple(verify.guesses), deadline_s, sampling)
        case "forget":
            return Forget(session)
        case _:
            raise _out_of_order("it asks nothing")


def origin(data: bytes) -> tuple[int, str]:
    """Id and session under which to answer a message that `asked` has refused; 0 and "" where it names none."""
    try:
        message = pb.Ask.FromString(data)
    except DecodeError:
        return 0, ""
    known = message.session if message.session.isprintable() else ""
    return message.want.id or message.verify.id, known[:_MAX_NAME_BYTES]


def told_bytes(reply: Told) -> bytes:
    """The message of a reply."""
    message = pb.Told(
        id=reply.id,
        session=reply.session,
        known=reply.known,
        token=reply.token,
        accepted=reply.accepted,
        compute_s=reply.compute_s,
        reason=reply.reason,
        detail=_clip(reply.detail),
    )
    return _bytes(message)


def told(data: bytes) -> Told:
    """The cloud's message, which may be wrong as well. Raises DataError."""
    message = _parse(pb.Told, data)
    _require(math.isfinite(message.compute_s) and message.compute_s >= 0, "its time is none")
    _require(len(message.reason) <= _MAX_NAME_BYTES, "its reason is too long")
    return Told(
        id=message.id,
        session=message.session,
        known=message.known,
        token=message.token,
        accepted=message.accepted,
        compute_s=message.compute_s,
        reason=_clip(message.reason),
        detail=_clip(message.detail),
    )


def row_bytes(coding: Coding, hidden: int) -> int:
    """Of one state."""
    return {"f32": 4 * hidden, "f16": 2 * hidden, "u8": 8 + hidden}[coding]


def _hidden(session: str, message: pb.Hidden, hidden: int) -> Hidden:
    _require(message.coding in CODINGS, f"its coding is {message.coding[:20]!r}")
    coding = cast("Coding", message.coding)
    wanted = message.count * row_bytes(coding, hidden)
    _require(
        len(message.data) == wanted, f"{message.count} states of {hidden} numbers come as {len(message.data)} bytes"
    )
    rows = _decode(message.data, message.count, coding, hidden)
    _require(np.isfinite(rows).all(), "a state is no number")
    return Hidden(session, message.start, rows)


def _encode(x: Array, coding: Coding) -> bytes:
    if coding != "u8":
        return x.astype("<f4" if coding == "f32" else "<f2").tobytes()
    x = x.astype(np.float32)
    least = x.min(axis=1, keepdims=True) if x.size else np.empty((len(x), 1))
    steps = (x.max(axis=1, keepdims=True) / 255 - least / 255) if x.size else np.empty((len(x), 1))
    scaled = np.rint(np.divide(x - least, steps, out=np.zeros_like(x), where=steps > 0)).astype(np.uint8)
    head = np.concatenate([least, steps], axis=1).astype("<f4")
    return np.concatenate([head.view(np.uint8).reshape(len(x), 8), scaled], axis=1).tobytes()


def _decode(data: bytes, count: int, coding: Coding, hidden: int) -> Array:
    """Rows [count, hidden]: float16 for f16, else float32."""
    if coding != "u8":
        return np.frombuffer(data, "<f4" if coding == "f32" else "<f2").reshape(count, hidden)
    packed = np.frombuffer(data, np.uint8).reshape(count, 8 + hidden)
    head = packed[:, :8].copy().view("<f4")
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is refused afterwards
        rows: Array = head[:, :1] + packed[:, 8:].astype(np.float32) * head[:, 1:]
    return rows


def _sampling(data: bytes) -> Sampling:
    if not data:
        return GREEDY
    _require(len(data) <= _MAX_SAMPLING_BYTES, "its sampling is too long")
    try:
        found = msgspec.json.decode(data, type=Sampling)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _out_of_order(f"its sampling is none ({error})") from error
    if found.presence_penalty or found.frequency_penalty:
        raise DataError("Penalties need the tokens before, which the cloud does not know; ask without penalties.")
    return found


def _deadline(deadline_s: float, limits: LlmLimits) -> float:
    _require(0 < deadline_s <= limits.max_deadline_s, f"its deadline is {deadline_s} s")
    return deadline_s


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise DataError(f"These bytes are no message; {_AGAIN}.") from error


def _bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _clip(text: str) -> str:
    """A sentence as it may be sent and shown."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MAX_DETAIL])


def _require(condition: Any, why: str) -> None:
    if not condition:
        raise _out_of_order(why)


def _out_of_order(why: str) -> DataError:
    return DataError(f"A message is out of order: {why}; {_AGAIN}.")
