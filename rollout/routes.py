"""Which address and interface of this machine lead to another one. One rule for every connection between machines.

A machine's own name is no answer: Debian and Ubuntu map it to 127.0.1.1, which no other machine can reach.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

_ANY_PORT = 9  # nothing is sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """An address of this machine, and the interface that has it."""

    address: str
    interface: str

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it."""
        return ipaddress.ip_address(self.address).is_loopback


def route_to(host: str) -> Route:
    """How packets to `host`, a name or an address, leave this machine.

    Raises:
        ValueError: the name is unknown, or there is no way to it.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)  # chooses the route
            address = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(
            f"host {host!r}: cannot be reached from here ({error.strerror}); expected a name or address of a machine"
        ) from error
    return Route(address=address, interface=_interface_of(address))


def route_to_others(hosts: Iterable[str]) -> Route:
    """The first route that leaves this machine; a loopback route when every host is this machine.

    Args:
        hosts: names or addresses of machines of a job, this one perhaps among them. At least one.

    Raises:
        ValueError: as route_to; or no hosts.
    """
    routes = []
    for host in hosts:
        route = route_to(host)
        if not route.is_loopback and not _is_own(host):
            return route
        routes.append(route)
    if not routes:
        raise ValueError("no hosts, expected the machines of the job")
    return next((route for route in routes if not route.is_loopback), routes[0])


def _is_own(host: str) -> bool:
    """Whether `host` is one of this machine's addresses, or a name for one."""
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    found = {str(where[0]) for *_, where in socket.getaddrinfo(host, None)}
    return any(address in own or ipaddress.ip_address(address).is_loopback for address in found)


def _interface_of(address: str) -> str:
    """The name of the interface with that address; of several loopback addresses (127.0.1.1) only one is listed."""
    if ipaddress.ip_address(address).is_loopback:
        address = "127.0.0.1" if "." in address else "::1"
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    raise ValueError(f"address {address}: no interface of this machine has it")
