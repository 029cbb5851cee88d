"""How the ranks of one epoch find each other: rank i dials all below it and accepts all above it, and both ends prove
that they know the session's key.

    dialler:   MAGIC, epoch, size, its rank, the other's rank, nonce
    acceptor:  nonce, HMAC-SHA256(key, "accept", both nonces and all numbers)
    dialler:   HMAC-SHA256(key, "dial", the same)
    acceptor:  READY

Off loopback all of it happens inside TLS with pinned certificates. Owns dialling, accepting and proving, each in a
thread of its own, so that a stranger who says nothing holds up nobody. Must never outlast `connect_timeout_s`.
"""

import contextlib
import hmac
import queue
import secrets
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fedge.core.addresses import is_local
from fedge.core.errors import ExperimentError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.mesh.security import Tls, accepting, dialling, is_pinned

HELLO = struct.Struct("<8sIHHH32s")
MAGIC, READY = b"fedgeLM1", b"\x01"
NONCE_BYTES = MAC_BYTES = 32
LEAST_KEY_BYTES = 16
STRANGER_S = 3.0  # how long one that came may take to prove who it is
RETRY_S = 0.05
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Party:
    """What one rank knows before it meets the others. `addresses` ("host:port") by rank; `due_at` on time.monotonic."""

    rank: int
    size: int
    addresses: Sequence[str]
    key: bytes = field(repr=False)
    epoch: int
    tls: Tls | None
    due_at: float


class _Refused(Exception):
    """The other end is not who it should be."""


def meet(party: Party, listener: socket.socket, limits: LlmLimits) -> dict[int, socket.socket]:
    """A proven connection to every other rank. Raises RankLost naming who is missing, ExperimentError for settings."""
    _check(party)
    meeting = _Meeting(party, limits)
    try:
        for peer in range(party.rank):
            meeting.start(partial(_dial, meeting, peer))
        while len(meeting.met) < party.size - 1 and time.monotonic() < party.due_at:
            _accept(meeting, listener)
            meeting.collect()
    except BaseException:
        meeting.over(keep=False)
        raise
    complete = len(meeting.met) == party.size - 1
    meeting.over(keep=complete)
    if not complete:
        raise _missing(party, meeting, limits)
    return meeting.met


class _Meeting:
    """The threads of one meeting and what they have found."""

    def __init__(self, party: Party, limits: LlmLimits) -> None:
        self.party = party
        self.met: dict[int, socket.socket] = {}
        self.why: dict[int, str] = {}  # by rank, what came of the last try to dial it
        self.ended = threading.Event()
        self.most = 4 * limits.max_ranks
        self._found: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.accepting = None if party.tls is None else accepting(party.tls, party.rank)

    def start(self, work: Callable[[], None]) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, name="fedge-handshake", daemon=True)
        thread.start()
        self._threads.append(thread)

    @property
    def crowded(self) -> bool:
        """Whether too many are just proving who they are."""
        return sum(thread.is_alive() for thread in self._threads) >= self.most

    def found(self, rank: int, sock: socket.socket) -> None:
        """A thread has proven this connection; one that comes too late is closed."""
        self._found.put((rank, sock))
        if self.ended.is_set():
            self._drop()

    def collect(self) -> None:
        """Take what the threads have found; a rank that came again replaces itself."""
        while not self._found.empty():
            rank, sock = self._found.get()
            if rank in self.met:
                self.met[rank].close()
            self.met[rank] = sock

    def over(self, keep: bool) -> None:
        """Let all threads end, which look at `ended` and at the clock; close what is not kept."""
        self.ended.set()
        self._drop()
        if not keep:
            for sock in self.met.values():
                sock.close()

    def _drop(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._found.get_nowait()[1].close()


def _accept(meeting: _Meeting, listener: socket.socket) -> None:
    """Wait a moment for somebody to come, and let a thread ask who it is."""
    listener.settimeout(POLL_S)
    try:
        sock, _ = listener.accept()
    except TimeoutError:
        return
    except OSError as error:
        raise RankLost(f"Rank {meeting.party.rank} cannot accept others ({error}); start it again.") from error
    if meeting.crowded:
        sock.close()
        return
    meeting.start(partial(_answer, meeting, sock))


def _answer(meeting: _Meeting, sock: socket.socket) -> None:
    party, due_at = meeting.party, min(meeting.party.due_at, time.monotonic() + STRANGER_S)
    try:
        _refuse_plaintext(party, sock)
        if meeting.accepting is not None:
            sock.settimeout(_left(due_at))
            sock = meeting.accepting.wrap_socket(sock, server_side=True)
        hello = _read(sock, HELLO.size, due_at)
        magic, epoch, size, rank, own, _ = HELLO.unpack(hello)
        ours = (magic, epoch, size, own) == (MAGIC, party.epoch, party.size, party.rank)
        _require(ours and own < rank < size, "it is of another group or epoch")
        nonce = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(nonce + _mac(party, b"accept", hello, nonce))
        proof = _read(sock, MAC_BYTES, due_at)
        _require(hmac.compare_digest(proof, _mac(party, b"dial", hello, nonce)), "it has another key")
        _require_pin(party, sock, rank)
        sock.sendall(READY)
    except (OSError, ValueError, _Refused):
        sock.close()  # a stranger; who is missing in the end will be named
        return
    meeting.found(rank, sock)


def _dial(meeting: _Meeting, peer: int) -> None:
    """Try until it works or the time is over."""
    party = meeting.party
    while not meeting.ended.is_set() and time.monotonic() < party.due_at:
        try:
            meeting.found(peer, _dial_once(party, peer))
            return
        except (OSError, ValueError, ExperimentError, _Refused) as error:  # a certificate may be none that TLS takes
            meeting.why[peer] = str(error)
        meeting.ended.wait(RETRY_S)


def _dial_once(party: Party, peer: int) -> socket.socket:
    sock = socket.create_connection(_split(party.addresses[peer]), timeout=_left(party.due_at))
    try:
        _refuse_plaintext(party, sock)
        if party.tls is not None:
            sock = dialling(party.tls, peer).wrap_socket(sock)
            _require_pin(party, sock, peer)
        hello = HELLO.pack(MAGIC, party.epoch, party.size, party.rank, peer, secrets.token_bytes(NONCE_BYTES))
        sock.sendall(hello)
        nonce = _read(sock, NONCE_BYTES, party.due_at)
        proof = _read(sock, MAC_BYTES, party.due_at)
        _require(hmac.compare_digest(proof, _mac(party, b"accept", hello, nonce)), "it has another key")
        sock.sendall(_mac(party, b"dial", hello, nonce))
        _require(_read(sock, len(READY), party.due_at) == READY, "it does not speak this protocol")
    except BaseException:
        sock.close()
        raise
    return sock


def _require(condition: bool, why: str) -> None:
    if not condition:
        raise _Refused(why)


def _mac(party: Party, role: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(party.key, role + b"\0" + hello + nonce, "sha256")


def _read(sock: socket.socket, count: int, due_at: float) -> bytes:
    """Exactly so many bytes. Raises _Refused at the end of the stream, TimeoutError at `due_at`."""
    data = b""
    while len(data) < count:
        sock.settimeout(_left(due_at))
        piece = sock.recv(count - len(data))
        if not piece:
            raise _Refused("it hung up, as it does on other keys and epochs")
        data += piece
    return data


def _left(due_at: float) -> float:
    left = due_at - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer")
    return left


def _require_pin(party: Party, sock: socket.socket, peer: int) -> None:
    if party.tls is not None:
        pinned = isinstance(sock, ssl.SSLSocket) and is_pinned(sock, party.tls, peer)
        _require(pinned, "it has another rank's certificate")


def _refuse_plaintext(party: Party, sock: socket.socket) -> None:
    if party.tls is None:
        both = is_local(sock.getsockname()[0]) and is_local(sock.getpeername()[0])
        _require(both, "it is on another device, where TLS is needed")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ExperimentError(f"{address!r} is no address of a rank; give host:port.")
    return host.strip("[]"), int(port)


def _check(party: Party) -> None:
    """Refuse what can never work, before anything is sent."""
    if not 0 <= party.rank < party.size <= 0xFFFF or len(party.addresses) != party.size:
        raise ExperimentError(
            f"Rank {party.rank} of {party.size} with {len(party.addresses)} addresses is no group; give one each."
        )
    if len(party.key) < LEAST_KEY_BYTES:
        raise ExperimentError(f"The session's key has less than {LEAST_KEY_BYTES} bytes; draw a longer one.")
    if not 0 <= party.epoch <= 0xFFFFFFFF:
        raise ExperimentError(f"Epoch {party.epoch} is none; count from 0.")
    if party.tls is not None and len(party.tls.peers) != party.size:
        raise ExperimentError(f"{len(party.tls.peers)} certificates for {party.size} ranks; give one of each rank.")
    for address in party.addresses[: party.rank]:
        host, _ = _split(address)
        if party.tls is None and not is_local(host):
            raise ExperimentError(f"{address} is another device and would be talked to in the clear; give it TLS.")


def _missing(party: Party, meeting: _Meeting, limits: LlmLimits) -> RankLost:
    missing = [rank for rank in range(party.size) if rank != party.rank and rank not in meeting.met]
    each = "; ".join(f"{rank}: {meeting.why.get(rank, 'it did not come')}" for rank in missing)
    return RankLost(
        f"Ranks are missing after {limits.connect_timeout_s:g} s ({each}); see that they run, can be reached and are "
        "of the same group.",
        missing[0],
    )
