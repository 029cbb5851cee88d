"""Addresses of peers: their form, which of them other machines can reach, and how the silence of a peer is noticed.

One rule for every room that talks over a network. Settings of gRPC are plain pairs. Must never open a socket, resolve
a name or import gRPC.
"""

import ipaddress

from fedge.core.errors import AddressError
from fedge.core.limits import Limits


def parse(address: str) -> tuple[str, int]:
    """Host and port, the host as it is written. Raises AddressError for what is no "host:port"."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 1 << 16):
        raise AddressError(f"{address!r} is no address; write host:port, such as 127.0.0.1:7443.")
    return host, int(port)


def is_local(host: str) -> bool:
    """Whether a host never leaves this machine; of names, only localhost: another may be pointed anywhere."""
    name = host.strip("[]")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def check_listen(listen: str, allow_remote: bool) -> None:
    """Raises AddressError for what is no host:port, and for one that others can reach unless that is allowed."""
    host, _ = parse(listen)
    if allow_remote or is_local(host):
        return
    raise AddressError(
        f"{listen} can be reached by other machines, and there is no TLS yet; "
        "listen on 127.0.0.1, or pass --insecure-remote on a network you trust."
    )


def keepalive(limits: Limits = Limits()) -> list[tuple[str, int]]:
    """Settings of gRPC by which either end finds a silent peer within keepalive_time_s + keepalive_timeout_s.

    Even behind a proxy that still acknowledges TCP: that needs ping_timeout_ms, which keepalive_timeout_ms alone does
    not bound.
    """
    timeout_ms = int(limits.keepalive_timeout_s * 1000)
    return [
        ("grpc.keepalive_time_ms", int(limits.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def keepalive_server(limits: Limits = Limits()) -> list[tuple[str, int]]:
    """`keepalive` for the end that listens: it also bears the pings of the others."""
    return [
        *keepalive(limits),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(limits.min_ping_interval_s * 1000)),
    ]
