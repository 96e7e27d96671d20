"""All nodes of a job look at themselves and at each other before a GPU is spent: `minpro doctor CONFIG --peers n0,n1,...` on each.

The first node keeps a TCP store; each node sends its report there and gets the verdict back. The trainer nodes then add up one
number over the network that training will use.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.cluster.checks import missing_paths, problems
from megatron_minpro.cluster.facts import NodeReport, describe_node
from megatron_minpro.config import RunConfig
from parallel.capabilities import detect

_POLL_S = 0.1


class BadNodes(RuntimeError):
    """Some nodes cannot take part; the message names each with its reason, and the sbatch option that leaves them out."""

    def __init__(self, found: Mapping[str, Sequence[str]]) -> None:
        self.found = {node: tuple(lines) for node, lines in found.items()}
        reasons = "; ".join(f"{node}: {', '.join(lines)}" for node, lines in self.found.items())
        super().__init__(f"preflight: {reasons}. Submit again with --exclude={','.join(self.found)}, or repair")


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """This node's place in the job. trainers: how many of `nodes`, from the first on, train; the others serve."""

    node: str
    nodes: tuple[str, ...]
    trainers: int
    port: int
    gpus_per_node: int
    timeout_s: float

    def __post_init__(self) -> None:
        if self.node not in self.nodes:
            raise ValueError(f"--node is {self.node!r}, expected one of --peers {','.join(self.nodes)}")
        if not 0 < self.trainers <= len(self.nodes):
            raise ValueError(f"--trainers is {self.trainers}, expected 1 to {len(self.nodes)}, the number of --peers")

    @property
    def index(self) -> int:
        return self.nodes.index(self.node)

    @property
    def roles(self) -> dict[str, str]:
        return {node: "trainer" if index < self.trainers else "server" for index, node in enumerate(self.nodes)}


def check_cluster(config: RunConfig, membership: Membership, *, announce: Callable[[str], None]) -> None:
    """Run on every node at once. Returns when all of them are fit; the first node writes RUN_DIR/preflight.json.

    Args:
        config: the run.
        membership: this node's place in the job.
        announce: takes lines for people, on the first node.

    Raises:
        BadNodes: some node is unfit; on every node that can be reached.
        TimeoutError: the first node cannot be reached.
    """
    first = membership.index == 0
    address = "0.0.0.0" if first else membership.nodes[0]
    store = _join(address, membership)
    report = describe_node(
        config, node=membership.node, serves=membership.roles[membership.node] == "server", missing=missing_paths(config)
    )
    store.set(f"report/{membership.node}", report.to_json())
    if first:
        reports, arrival_s = _collect(store, membership)
        found = problems(reports, gpus_per_node=membership.gpus_per_node, arrival_s=arrival_s, roles=membership.roles)
        told = {node: json.loads(report.to_json()) if report else None for node, report in reports.items()}
        write_atomically(config.run_dir / "preflight.json", json.dumps({"problems": found, "nodes": told}, indent=2) + "\n")
        store.set("verdict", json.dumps(found))
    found = json.loads(_get(store, "verdict", 2 * membership.timeout_s, what=f"the verdict of {membership.nodes[0]}"))
    if not found and membership.index < membership.trainers:
        _all_reduce(store, membership)
    store.set(f"done/{membership.node}", "1")
    if first:
        # The store lives here: when this process ends, the other nodes get no more answers.
        silent = _silent(store, [node for node, report in reports.items() if report is not None], membership.timeout_s)
        found = found or {node: ["did not take part in a sum over the trainer nodes"] for node in silent}
        announce(f"preflight: {len(membership.nodes)} nodes, " + (f"{len(found)} of them unfit" if found else "all fit"))
    if found:
        raise BadNodes(found)


def read_reports(path: Path) -> dict[str, NodeReport | None]:
    """The reports in a preflight.json."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return {node: None if values is None else NodeReport.from_json(json.dumps(values)) for node, values in nodes.items()}


def _join(address: str, membership: Membership) -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=membership.timeout_s)
    try:
        return dist.TCPStore(address, membership.port, is_master=membership.index == 0, wait_for_workers=False, timeout=timeout)
    except dist.DistError as error:
        reason = str(error).splitlines()[0][:200]
        raise TimeoutError(f"preflight: {membership.node} cannot reach {address}, port {membership.port}: {reason}") from error


def _collect(store: dist.Store, membership: Membership) -> tuple[dict[str, NodeReport | None], dict[str, float]]:
    reports: dict[str, NodeReport | None] = dict.fromkeys(membership.nodes)
    arrival_s: dict[str, float] = {}
    deadline = time.monotonic() + membership.timeout_s
    while len(arrival_s) < len(reports) and time.monotonic() < deadline:
        for node in membership.nodes:
            if reports[node] is None and store.check([f"report/{node}"]):
                reports[node] = NodeReport.from_json(store.get(f"report/{node}").decode())
                arrival_s[node] = time.time()
        time.sleep(_POLL_S)
    return reports, arrival_s


def _silent(store: dist.Store, nodes: Sequence[str], timeout_s: float) -> list[str]:
    """Those that did not get to the end in time."""
    deadline = time.monotonic() + timeout_s
    waiting = list(nodes)
    while waiting and time.monotonic() < deadline:
        waiting = [node for node in waiting if not store.check([f"done/{node}"])]
        time.sleep(_POLL_S)
    return waiting


def _all_reduce(store: dist.Store, membership: Membership) -> None:
    """One number from each trainer node, added up with the backend that training will use. Raises RuntimeError on a wrong sum."""
    capabilities = detect()
    timeout = datetime.timedelta(seconds=membership.timeout_s)
    dist.init_process_group(
        capabilities.backend,
        store=dist.PrefixStore("sum", store),
        rank=membership.index,
        world_size=membership.trainers,
        timeout=timeout,
    )
    try:
        total = torch.tensor([membership.index + 1.0], device=capabilities.device_type)
        dist.all_reduce(total)
        expected = membership.trainers * (membership.trainers + 1) / 2
        if float(total) != expected:
            raise RuntimeError(f"preflight: {capabilities.backend} all-reduce gave {float(total)}, expected {expected}")
    finally:
        dist.destroy_process_group()


def _get(store: dist.Store, key: str, timeout_s: float, *, what: str) -> str:
    deadline = time.monotonic() + timeout_s
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"preflight: {what} did not come within {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    return store.get(key).decode()
