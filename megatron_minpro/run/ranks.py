"""Start the trainer ranks of this machine: with torchrun, or forked where there is no CUDA."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from megatron_minpro.config import RunConfig
from megatron_minpro.working_folder import child_environment
from parallel.capabilities import Capabilities
from rollout.loopback import is_loopback
from rollout.processes import ManagedProcess, fork, spawn


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
    if rendezvous is None:
        command += ["--standalone"]
    else:
        command += [f"--nnodes={rendezvous.machines}", f"--node-rank={rendezvous.machine}"]
        command += [f"--master-addr={rendezvous.address}", f"--master-port={rendezvous.port}"]
    if loopback:
        command += ["--local-addr=127.0.0.1"]
    environment = _environment(loopback=loopback, variables=variables)
    return spawn([*command, "-m", module, *arguments], log_path=log_path, env=environment, name=name, ignore_signals=ignore_signals)


def are_forked(config: RunConfig, capabilities: Capabilities) -> bool:
    """Whether the ranks of `minpro train` come from one process: not where CUDA is, nor where servers on other machines meet them."""
    return capabilities.device_type == "cpu" and on_loopback(config)


def on_loopback(config: RunConfig) -> bool:
    """Whether everything the ranks of a run on one machine talk to is on this machine."""
    hosts = [urlsplit(endpoint).hostname or "" for endpoint in config.rollout.endpoints]
    return is_loopback(config.rollout.host) and all(map(is_loopback, hosts))


def start_forked_ranks(
    arguments: Sequence[str], *, count: int, name: str, log_path: Path, ignore_signals: Sequence[signal.Signals] = ()
) -> ManagedProcess:
    """As start_ranks for megatron_minpro.run.rank, on loopback and without CUDA: one process imports for all of them."""
    command = [sys.executable, "-m", "megatron_minpro.run.forked_ranks", str(count), *arguments]
    environment = _environment(loopback=True, variables={})
    return spawn(command, log_path=log_path, env=environment, name=name, ignore_signals=ignore_signals)


def fork_ranks(
    arguments: Sequence[str], *, count: int, name: str, log_path: Path, ignore_signals: Sequence[signal.Signals] = ()
) -> ManagedProcess:
    """As start_forked_ranks, from a process that has imported what a rank needs: no other process imports it again."""
    from megatron_minpro.run import forked_ranks  # imports Megatron-Core, which other launchers do without

    def run() -> None:
        os.environ.update(_environment(loopback=True, variables={}))
        forked_ranks.main([str(count), *arguments])

    return fork(run, name=name, log_path=log_path, ignore_signals=ignore_signals)


def _environment(*, loopback: bool, variables: Mapping[str, str]) -> dict[str, str]:
    environment = {**variables, **child_environment()}
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("OMP_NUM_THREADS", "1")
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return environment
