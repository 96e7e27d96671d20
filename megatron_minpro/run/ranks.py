"""Start the trainer ranks of this machine with torchrun."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megatron_minpro.working_folder import child_environment
from rollout.processes import ManagedProcess, spawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the machines of one job meet, and which of them this one is."""

    machines: int
    machine: int
    address: str
    port: int


def start_ranks(
    module: str,
    arguments: Sequence[str],
    *,
    count: int,
    name: str,
    log_path: Path,
    loopback: bool,
    rendezvous: Rendezvous | None = None,
    ignore_signals: Sequence[signal.Signals] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> ManagedProcess:
    """`python -m module arguments...` once per rank, under one torchrun.

    Args:
        count: ranks on this machine.
        name: what messages call the process.
        loopback: listen on 127.0.0.1 alone, because everything the ranks talk to is on this machine.
        rendezvous: the other machines; None when there are none.
        ignore_signals: signals that torchrun survives.
        variables: set in the ranks' environment where this process's has no value.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    environment = {**variables, **child_environment()}
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("OMP_NUM_THREADS", "1")
    if rendezvous is None:
        command += ["--standalone"]
    else:
        command += [f"--nnodes={rendezvous.machines}", f"--node-rank={rendezvous.machine}"]
        command += [f"--master-addr={rendezvous.address}", f"--master-port={rendezvous.port}"]
    if loopback:
        command += ["--local-addr=127.0.0.1"]
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return spawn([*command, "-m", module, *arguments], log_path=log_path, env=environment, name=name, ignore_signals=ignore_signals)
