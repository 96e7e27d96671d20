"""What this node says of itself, before it knows of the others."""

from __future__ import annotations

import platform
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from megatron_minpro.cluster.facts import REQUIRED, distribution_version
from megatron_minpro.cluster.nodes.membership import Membership
from megatron_minpro.cluster.nodes.report import NodeReport
from megatron_minpro.cluster.nodes.trial import NodeTrial
from megatron_minpro.cluster.paths import missing_paths
from megatron_minpro.config import RunConfig
from rollout.ports import check_port_free
from rollout.routes import Route


def describe_node(
    config: RunConfig,
    membership: Membership,
    trial: NodeTrial,
    *,
    route: Route,
    port: int,
    store_port: int,
    variables: Mapping[str, str],
    lacking: Sequence[str],
) -> NodeReport:
    """
    Args:
        config: the run.
        membership: this node's place in the job.
        trial: its processes; they have computed.
        route: to the others.
        port: where they can try to reach it.
        store_port: where the members of all nodes will meet, if that is on this node.
        variables: of the role's processes.
        lacking: what is known to be missing already.
    """
    node, role = membership.node, membership.role
    versions = {"python": platform.python_version()}
    versions |= {name: distribution_version(name) or "absent" for name, _ in REQUIRED}
    installation = trial.installation
    if installation is not None:
        versions["transformer-engine" if role == "trainer" else "sglang"] = installation.engine.version or "absent"
    return NodeReport(
        node=node,
        role=role,
        gpus=trial.devices,
        device_faults=tuple(trial.device_faults()),
        address=route.address,
        interface=route.interface,
        port=port,
        store_port=store_port,
        means={other: _address_of(other) for other in membership.nodes},
        interfaces=tuple(psutil.net_if_addrs()),
        installation=installation,
        variables={name: value for name, value in variables.items() if name.startswith(("NCCL_", "GLOO_"))},
        ports_in_use=tuple(each for each in membership.ports(config)[node] if _in_use(each)),
        free_bytes=shutil.disk_usage(_existing(config.run_dir)).free,
        memory_bytes=psutil.virtual_memory().available,
        versions=versions,
        missing=(*lacking, *missing_paths(config)),
    )


def _address_of(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return f"nothing ({error.strerror})"


def _in_use(port: int) -> bool:
    try:
        check_port_free("0.0.0.0", port)
    except ValueError:
        return True
    return False


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())
