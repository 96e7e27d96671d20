"""Free ports of this machine that no two processes of this project ever choose at the same time."""

from __future__ import annotations

import contextlib
import random
import socket

_FREE_PORTS = range(20_000, 32_000)  # below the kernel's ephemeral range

# Held until this process ends. The name is an abstract socket's: it lives in the same network namespace as the port that it stands for,
# leaves no file, and goes with the process, however that ends.
_claims: list[socket.socket] = []


def check_port_free(host: str, port: int) -> None:
    """Raises ValueError (one line) when something already listens on host:port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"rollout.base_port: port {port} on {host} cannot be used ({error.strerror}); choose another or null for free ones"
            ) from error


def free_ports(host: str, count: int) -> list[int]:
    """`count` different ports that nothing listens on and that no other process has been given by this function and may still use.

    They come from below the kernel's ephemeral range: a port from it could go to any connection or listener that is opened meanwhile.
    Raises RuntimeError when none is left.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_FREE_PORTS, len(_FREE_PORTS)):
        with contextlib.suppress(ValueError):
            check_port_free(host, port)
            if _claim(port):
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{host}: fewer than {count} free ports among {_FREE_PORTS.start} to {_FREE_PORTS.stop - 1}")


def _claim(port: int) -> bool:
    """Whether `port` is now this process's; False when another process, or this one earlier, holds it."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0minpro-port-{port}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True
