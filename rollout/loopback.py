"""Addresses that no other machine can reach."""

from __future__ import annotations

import ipaddress

LOOPBACK_INTERFACE = "lo"


def is_loopback(host: str) -> bool:
    """True for localhost and for every loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
