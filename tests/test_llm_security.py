"""Who may talk to whom: pinned certificates, the ticket, and nothing in the clear off loopback."""

import json
import socket
import ssl
import stat
import threading
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.core.addresses import is_local
from fedge.core.errors import ExperimentError, RankLost
from fedge.core.limits import LlmLimits
from fedge.edge.llm.mesh import handshake
from fedge.edge.llm.mesh.mesh import connect
from fedge.edge.llm.mesh.security import (
    KEY,
    SERVER_NAME,
    TICKET,
    Tls,
    accepting,
    dialling,
    identity,
    is_pinned,
    make_ticket,
    read_key,
    read_ticket,
)
from tests.llm_group import KEY as SESSION
from tests.llm_group import LIMITS, credentials, in_threads, listeners

SHORT = replace(LIMITS, connect_timeout_s=2.0, step_timeout_s=0.5)
NEVER_MET = replace(SHORT, connect_timeout_s=1.0)


def meet(secrets: list[Tls | None], limits: LlmLimits = NEVER_MET) -> list[Any]:
    """Sums of ranks that speak TLS with these credentials, or what they raised."""
    size = len(secrets)
    made, addresses = listeners(size)

    def one(rank: int) -> float:
        with connect(
            rank, size, addresses, SESSION, 3, listener=made[rank], limits=limits, tls=secrets[rank], collective="full"
        ) as mesh:
            return float(mesh.allreduce(np.ones(2, np.float32)).sum())

    try:
        return in_threads([lambda rank=rank: one(rank) for rank in range(size)])  # type: ignore[misc]
    finally:
        for listener in made:
            listener.close()


def test_ranks_with_pinned_certificates_meet() -> None:
    assert meet(list(credentials(4)), LIMITS) == [8.0] * 4


def _of_another(rank: int, secrets: list[Tls]) -> Tls:
    """Rank's credentials with a certificate that nobody has pinned."""
    certificate, key = identity()
    return replace(secrets[rank], certificate=certificate, key=key)


def _signed_by_a_pinned_one(rank: int, secrets: list[Tls]) -> Tls:
    """With a certificate that the pinned key has signed for another key, as an authority would."""
    signer = serialization.load_pem_private_key(secrets[rank].key.encode(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    pinned = x509.load_pem_x509_certificate(secrets[rank].certificate.encode())
    own = ec.generate_private_key(ec.SECP256R1())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "child")]))
        .issuer_name(pinned.subject)
        .public_key(own.public_key())
        .serial_number(7)
        .not_valid_before(pinned.not_valid_before_utc)
        .not_valid_after(pinned.not_valid_after_utc)
        .sign(signer, hashes.SHA256())
    )
    key = own.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return replace(secrets[rank], certificate=made.public_bytes(serialization.Encoding.PEM).decode(), key=key.decode())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("make", [_of_another, _signed_by_a_pinned_one])
def test_a_certificate_that_is_not_pinned_is_refused(make: Any, rank: int) -> None:
    secrets = credentials(2)
    secrets[rank] = make(rank, secrets)
    for result in meet(list(secrets)):
        assert isinstance(result, RankLost), result
        assert "missing" in str(result)


def test_a_rank_cannot_come_with_another_ranks_certificate() -> None:
    one, two, three = credentials(3)
    swapped = [one, replace(two, certificate=three.certificate, key=three.key), three]
    for result in meet(list(swapped))[:2]:
        assert isinstance(result, RankLost), result


@pytest.mark.parametrize("clear", [0, 1])
def test_a_rank_in_the_clear_and_one_in_tls_do_not_meet(clear: int) -> None:
    secrets: list[Tls | None] = list(credentials(2))
    secrets[clear] = None
    for result in meet(secrets):
        assert isinstance(result, RankLost), result


def test_one_certificate_per_rank_is_needed() -> None:
    one, two = credentials(2)
    for result in meet([replace(one, peers=one.peers[:1]), replace(two, peers=(*two.peers, two.certificate))]):
        assert isinstance(result, ExperimentError), result
        assert "one of each rank" in str(result)
    with pytest.raises(ExperimentError, match="new identity"):
        dialling(replace(two, key=one.key), 0)
    with pytest.raises(ExperimentError, match="new identity"):
        accepting(replace(one, peers=("", "garbage")), 0)


def test_older_tls_is_refused_and_the_pin_is_the_whole_certificate() -> None:
    secrets = credentials(2)
    assert accepting(secrets[0], 0).minimum_version == ssl.TLSVersion.TLSv1_3
    ours, theirs = socket.socketpair()
    answers: list[bool] = []

    def answer() -> None:
        with accepting(secrets[0], 0).wrap_socket(ours, server_side=True) as sock:
            answers.extend([is_pinned(sock, secrets[0], 1), is_pinned(sock, secrets[0], 0)])

    thread = threading.Thread(target=answer)
    thread.start()
    with dialling(secrets[1], 0).wrap_socket(theirs) as sock:
        assert sock.version() == "TLSv1.3"
        sock.recv(1)
    thread.join()
    assert answers == [True, False]


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("::ffff:192.168.0.3", False),
        ("192.168.0.3", False),
        ("0.0.0.0", False),  # noqa: S104
        ("fe80::1%eth0", False),
        ("10.0.0.1", False),
        ("::1%lo", True),
        ("[::1]", True),
        ("LocalHost", True),
        ("example.org", False),
        ("127.0.0.1%eth0", False),
        ("", False),
    ],
)
def test_only_loopback_counts_as_this_machine(address: str, local: bool) -> None:
    assert is_local(address) is local


def test_in_the_clear_another_device_gets_no_answer_and_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "is_local", lambda _: False)  # as if the other end were another device
    made, addresses = listeners(2)
    greeting = handshake.HELLO.pack(handshake.MAGIC, 3, 2, 1, 0, bytes(32))

    def stranger() -> bytes:
        with socket.create_connection(made[0].getsockname()) as sock:
            sock.sendall(greeting)
            try:
                return sock.recv(1)
            except ConnectionResetError:
                return b""

    def rank_0() -> None:
        connect(0, 2, addresses, SESSION, 3, listener=made[0], limits=SHORT)

    answer, refused = in_threads([stranger, rank_0])
    assert answer == b""
    assert isinstance(refused, RankLost)
    addresses = [address.replace("127.0.0.1", "localhost") for address in addresses]
    monkeypatch.setattr(handshake, "is_local", lambda host: host == "localhost")
    heard: list[bytes] = []

    def rank_1() -> None:
        connect(1, 2, addresses, SESSION, 3, listener=made[1], limits=SHORT)

    def listen() -> None:
        made[0].settimeout(20)
        with made[0].accept()[0] as sock:
            heard.append(sock.recv(1))

    _, refused = in_threads([listen, rank_1])
    assert heard == [b""]
    assert "TLS is needed" in str(refused)
    assert meet(list(credentials(2)), LIMITS) == [4.0] * 2
    for one in made:
        one.close()


# The ticket.


def test_a_ticket_is_made_once_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    folder = tmp_path / "head"
    path = make_ticket(folder)
    before = path.read_bytes()
    ticket = read_ticket(path)
    assert make_ticket(folder) == path == folder / TICKET
    assert path.read_bytes() == before
    for name in (TICKET, KEY):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    assert len(ticket.token) >= 32
    assert ticket.token not in repr(ticket)
    assert read_key(folder) not in path.read_text()
    assert sorted(one.name for one in folder.iterdir()) == [TICKET, KEY]
    assert read_ticket(make_ticket(tmp_path / "other")) != ticket


def test_grpc_speaks_tls_with_the_ticket_and_with_nothing_else(tmp_path: Path) -> None:
    ticket = read_ticket(make_ticket(tmp_path))
    server = grpc.server(futures.ThreadPoolExecutor(1))
    secret = grpc.ssl_server_credentials([(read_key(tmp_path).encode(), ticket.certificate.encode())])
    port = server.add_secure_port("127.0.0.1:0", secret)
    server.start()
    options = [("grpc.ssl_target_name_override", SERVER_NAME)]
    try:
        for root, works in ((ticket.certificate, True), (identity()[0], False)):
            trusted = grpc.ssl_channel_credentials(root.encode())
            with grpc.secure_channel(f"127.0.0.1:{port}", trusted, options) as channel:
                ready = grpc.channel_ready_future(channel)
                if works:
                    ready.result(30)
                else:
                    with pytest.raises(grpc.FutureTimeoutError):
                        ready.result(0.5)
    finally:
        server.stop(None).wait()


def _text(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"certificate": "x"' + b" " * 70_000 + b"}",
        _text(certificate=identity()[0]),
        _text(certificate=identity()[0], token="short"),  # noqa: S106
        _text(certificate=identity()[0], token=["long"] * 20),
        _text(certificate=7, token="t" * 32),
        _text(certificate="no certificate", token="t" * 32),
    ],
    ids=range(11),
)
def test_what_is_no_ticket_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / TICKET
    path.write_bytes(content)
    with pytest.raises(ExperimentError, match=r"copy ticket\.json"):
        read_ticket(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_ticket_are_refused_in_one_way(content: bytes, tmp_path: Path) -> None:
    (tmp_path / TICKET).write_bytes(content)
    with pytest.raises(ExperimentError):
        read_ticket(tmp_path / TICKET)


def test_missing_files_and_unusable_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="copy"):
        read_ticket(tmp_path / "none.json")
    with pytest.raises(ExperimentError, match="new ones"):
        read_key(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="another folder"):
        make_ticket(tmp_path / "file" / "below")


def test_a_certificate_that_is_none_keeps_its_rank_out_with_a_sentence() -> None:
    own = identity()
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    tls = Tls(*own, ("no certificate", own[0]))
    with listener, pytest.raises(RankLost, match="A certificate cannot be used"):
        connect(1, 2, [address, address], SESSION, 1, listener=listener, limits=SHORT, tls=tls)
    with pytest.raises(ExperimentError, match="new identity"):
        dialling(replace(tls, peers=("n\u00f6 certificate", own[0])), 0)
