"""Start a command on one node of a job with the network interface of the job chosen: gloo and NCCL listen on it.

    python -m megatron_minpro.cluster.interfaces n0,n1,n2,n3 COMMAND...

The interface is the one on the way to the other nodes. By itself gloo takes the address of the node's own name (127.0.1.1 on Debian), and
NCCL the first interface that it finds (of a virtual machine, perhaps). A variable that the user has set stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from rollout.routes import Route, route_to_others


def socket_variables(route: Route) -> dict[str, str]:
    """Name -> value for connections between machines; none on a machine that is alone."""
    if route.is_loopback:
        return {}
    return {"GLOO_SOCKET_IFNAME": route.interface, "NCCL_SOCKET_IFNAME": f"={route.interface}"}  # "=": this name, no other that begins so


def describe(route: Route, environment: Mapping[str, str]) -> str:
    """One line for people: the address, and what gloo and NCCL will listen on.

    Args:
        route: to the other nodes.
        environment: the variables that the user has set.
    """
    parts = [
        f"{name}={environment[name]} (set by you)" if name in environment else f"{name}={value}"
        for name, value in socket_variables(route).items()
    ]
    return f"network: {', '.join([f'the other nodes are reached from {route.address} on {route.interface}', *parts])}"


def main(arguments: Sequence[str]) -> None:
    """Replaces this process by the command."""
    peers, *command = arguments
    route = route_to_others(peers.split(","))
    print(describe(route, os.environ), flush=True)
    os.execvpe(command[0], command, {**socket_variables(route), **os.environ})


if __name__ == "__main__":
    main(sys.argv[1:])
