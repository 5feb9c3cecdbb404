"""Find the network interface that leads to a host, so that Torch RPC listens on that interface only."""

from __future__ import annotations

import socket

import psutil

from sgpo_async.errors import SessionError


def address_towards(host: str) -> str:
    """Return the address from which this machine reaches `host`. Raises SessionError without one."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # for a datagram socket this only looks up the route; it sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise SessionError(
            f"session host {host}: {error.strerror or error}; use an address of the hub's machine"
        ) from None


def is_own_address(host: str) -> bool:
    """Return whether `host` is this machine. Raises SessionError if it cannot be reached."""
    own = address_towards(host)
    return own in {address[0] for *_, address in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)}


def interface_towards(host: str) -> str:
    """Return the name of the interface from which this machine reaches `host`. Raises SessionError without one."""
    own = address_towards(host)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == own.partition("%")[0] for a in addresses):
            return name
    raise SessionError(f"session host {host}: no network interface of this machine has the address {own}")
