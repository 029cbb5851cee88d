"""Certificates and keys: who may talk to whom, without any authority outside the group.

A process makes a key of its own and signs its certificate itself. Certificates travel over the control plane, which
the **ticket** protects: the file that a user copies to each device. Between ranks each end trusts exactly the other's
certificate. Owns their making, their files (readable by their owner only), and TLS contexts that trust nobody else.
Must never open a connection.
"""

import datetime
import json
import os
import secrets
import ssl
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from fedge.core.errors import ExperimentError

SERVER_NAME = "fedge"  # in every certificate; what a client of the control server must expect instead of a host's name
TICKET, KEY = "ticket.json", "ticket.key"
_MAX_TICKET_BYTES = 1 << 16
_LEAST_TOKEN = 16  # characters
# Dates decide nothing here: a certificate is trusted because it is pinned, and devices boot with wrong clocks.
_BEGIN = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)  # RFC 5280, section 4.1.2.5: no end


@dataclass(frozen=True, slots=True)
class Ticket:
    """What a device needs to join: the certificate (PEM) of the control server, and the word that lets it in."""

    certificate: str
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tls:
    """One rank's certificate and key (PEM), and the certificates of all ranks by rank."""

    certificate: str
    key: str = field(repr=False)
    peers: tuple[str, ...]


def identity() -> tuple[str, str]:
    """A new certificate and its key (PEM): P-256, signed by itself, unable to sign others."""
    # Here, because a rank on loopback needs none of it and it takes long to load.
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    # A name of its own, because OpenSSL looks for the signer by name, and all in a list of equal names but one fail.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{SERVER_NAME} {secrets.token_hex(16)}")])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode(), secret.decode()


def accepting(tls: Tls, rank: int) -> ssl.SSLContext:
    """For the end of `rank` that is dialled: TLS 1.3, and only the certificates of the ranks that dial it."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, tls, tls.peers[rank + 1 :])
    context.num_tickets = 0  # nobody resumes, and no byte shall come that is not a frame's
    return context


def dialling(tls: Tls, peer: int) -> ssl.SSLContext:
    """For the end that dials rank `peer`: TLS 1.3, and only that rank's certificate."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, tls, tls.peers[peer : peer + 1])


def is_pinned(sock: ssl.SSLSocket, tls: Tls, peer: int) -> bool:
    """Whether the other end has shown the very certificate of rank `peer`."""
    return sock.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(tls.peers[peer])


def make_ticket(folder: Path) -> Path:
    """The ticket in `folder`, made with the control server's key if it is not there yet. Raises ExperimentError."""
    path, key_path = folder / TICKET, folder / KEY
    if path.exists() and key_path.exists():
        read_ticket(path)
        return path
    certificate, key = identity()
    content = json.dumps({"certificate": certificate, "token": secrets.token_urlsafe(32)}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(key_path, key)
        _write(path, content)
    except OSError as error:
        raise ExperimentError(f"No ticket can be written into {folder} ({error}); name another folder.") from error
    return path


def read_ticket(path: Path) -> Ticket:
    """Raises ExperimentError where the file is no ticket."""
    try:
        content = json.loads(_read(path))
        certificate, token = content["certificate"], content["token"]
        ssl.PEM_cert_to_DER_cert(certificate)
        short = len(token) < _LEAST_TOKEN
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ExperimentError(
            f"{path} is no ticket ({error}); copy {TICKET} from the device that starts the model."
        ) from error
    if short or not isinstance(token, str):
        raise ExperimentError(f"{path} has no token; copy {TICKET} from the device that starts the model.")
    return Ticket(certificate, token)


def read_key(folder: Path) -> str:
    """The control server's key (PEM) beside its ticket. Raises ExperimentError."""
    try:
        return _read(folder / KEY)
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{folder / KEY} cannot be read ({error}); delete both files for new ones.") from error


def _context(protocol: int, tls: Tls, trusted: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False  # a pinned certificate says more than a name
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        for certificate in trusted:
            context.load_verify_locations(cadata=certificate)
        with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:  # mode 0600; OpenSSL takes files only
            file.write(tls.key + tls.certificate)
            file.flush()
            context.load_cert_chain(file.name)
    except (OSError, ValueError, TypeError) as error:  # TypeError: letters that are not ASCII
        raise ExperimentError(f"A certificate cannot be used ({error}); make a new identity for each rank.") from error
    return context


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_TICKET_BYTES + 1)
    if len(data) > _MAX_TICKET_BYTES:
        raise ValueError("it is too long")
    return data.decode()


def _write(path: Path, text: str) -> None:
    """As a whole, with mode 0600 from its first byte on."""
    beside = path.with_name(path.name + ".tmp")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
