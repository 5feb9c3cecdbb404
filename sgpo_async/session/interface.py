"""Which network interface leads to a host: Torch RPC listens on that one only."""

from __future__ import annotations

import socket

import psutil

from sgpo_async.errors import SessionError


def interface_towards(host: str) -> str:
    """Name of the interface by which this machine talks to `host`. Raises SessionError if there is none."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: looks up the route, sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise SessionError(
            f"session host {host}: {error.strerror or error}; name an address of the hub's machine"
        ) from None
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == own.partition("%")[0] for a in addresses):
            return name
    raise SessionError(f"session host {host}: no network interface has the address {own}")
