"""All nodes of a job look at themselves and at each other before a GPU is spent: `minpro doctor CONFIG --peers n0,n1,...` on each.

Three rounds, within one time limit. Each node says something to all, and all draw the same conclusion:
    reports    what it is; every GPU has computed something by then
    reach      whether it reaches the others at their addresses, sees their files, and has the same time
    trial      sums over all trainer ranks, a broadcast from the first of them to every GPU of the servers
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.cluster.interfaces import socket_variables
from megatron_minpro.cluster.nodes import findings, reach
from megatron_minpro.cluster.nodes.describe import describe_node
from megatron_minpro.cluster.nodes.meeting import Meeting
from megatron_minpro.cluster.nodes.membership import Membership
from megatron_minpro.cluster.nodes.needs import needs_of
from megatron_minpro.cluster.nodes.report import NodeReport, ReachReport, Report, TrialReport, from_json, to_json
from megatron_minpro.cluster.nodes.trial import NodeTrial
from megatron_minpro.config import RunConfig
from megatron_minpro.working_folder import child_environment
from parallel.cuda_environment import cuda_environment
from rollout import nccl_variables
from rollout.ports import free_ports
from rollout.routes import route_to_others
from rollout.sglang.environment import default_server_python, link_packages, server_environment
from rollout.trial.events import Plan

REPORT_FILE = "preflight.json"
# Parts of the time limit after which the rounds end.
_REPORTS, _REACH = 0.6, 0.75


class BadNodes(RuntimeError):
    """Some nodes cannot take part; the message names each with its reason, and the sbatch option that leaves them out."""

    def __init__(self, found: Mapping[str, Sequence[str]]) -> None:
        self.found = {node: tuple(lines) for node, lines in found.items()}
        reasons = "; ".join(f"{node}: {', '.join(lines)}" for node, lines in self.found.items())
        super().__init__(f"preflight: {reasons}. Submit again with --exclude={','.join(self.found)}, or repair")


def check_cluster(config: RunConfig, membership: Membership, *, announce: Callable[[str], None]) -> None:
    """Run on every node at once. Returns when all of them are fit; the first node writes RUN_DIR/preflight.json.

    Args:
        config: the run.
        membership: this node's place in the job.
        announce: takes lines for people, on the first node.

    Raises:
        BadNodes: some node is unfit; on every node that can be reached.
        TimeoutError: the first node cannot be reached, or fell silent.
        ValueError: the configuration does not fit the nodes.
    """
    began, first = time.monotonic(), membership.index == 0
    reports_until, reach_until, until = (began + membership.timeout_s * part for part in (_REPORTS, _REACH, 1.0))
    devices, needs = membership.devices(config), needs_of(config, trainers=membership.trainers)
    route = route_to_others(membership.nodes)
    with ExitStack() as stack:
        python, lacking = _python(membership)
        variables = {**socket_variables(route), **_variables(config, membership, python, stack)}
        trial = stack.enter_context(
            NodeTrial(
                python=python,
                environment=variables,
                role=membership.role,
                members=max(devices[membership.node], membership.gpus_per_node),
                import_engine=membership.gpus_per_node > 0,
            )
        )
        listener = reach.Listener(route.address)
        stack.callback(listener.close)
        meeting = Meeting(membership)
        reach.leave_file(config.run_dir, membership.node)
        trial.wait_for_devices(reports_until - 1.0)
        report = describe_node(
            config,
            membership,
            trial,
            route=route,
            port=listener.port,
            store_port=free_ports("0.0.0.0", 1)[0] if first else 0,
            variables=variables,
            lacking=lacking,
        )

        reports = _parsed(NodeReport, meeting.all_say("report", to_json(report), until=reports_until))
        present = {node: each for node, each in reports.items() if each is not None}
        found = findings.problems(reports, findings.Job(gpus_per_node=membership.gpus_per_node, devices=devices, needs=needs))
        if not found:
            others = {node: each for node, each in present.items() if node != membership.node}
            mine = reach.try_to_reach(membership.node, others, config.run_dir, until=reach_until - 1.0)
            found = findings.unreachable(_parsed(ReachReport, meeting.all_say("reach", to_json(mine), until=reach_until)))
        if not found:
            faults = trial.take_part(_plan(config, membership, devices, present, until - time.monotonic()), until - 2.0)
            told = meeting.all_say("trial", to_json(TrialReport(node=membership.node, faults=tuple(faults))), until=until)
            found = findings.trial_faults(_parsed(TrialReport, told))
        if first:
            _write(config.run_dir / REPORT_FILE, reports, found)
        meeting.leave(until=time.monotonic())
        if first:
            reach.remove_files(config.run_dir)
            for line in _summary(reports, found):
                announce(line)
    if found:
        raise BadNodes(found)


def read_reports(path: Path) -> dict[str, NodeReport | None]:
    """The reports in a preflight.json."""
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return {node: None if values is None else from_json(NodeReport, json.dumps(values)) for node, values in nodes.items()}


def _parsed(kind: type[Report], said: Mapping[str, str | None]) -> dict[str, Report | None]:
    return {node: None if each is None else from_json(kind, each) for node, each in said.items()}


def _python(membership: Membership) -> tuple[Path, list[str]]:
    """Of the environment that this node's processes will have, and what is wrong with that. Without it the GPUs are tried all the same."""
    own = Path(sys.executable)
    try:
        return (own if membership.role == "trainer" else default_server_python()), []
    except ValueError as error:
        return own, [str(error)]


def _variables(config: RunConfig, membership: Membership, python: Path, stack: ExitStack) -> dict[str, str]:
    """The environment that this node's ranks or servers will have."""
    if membership.role == "server":
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minpro_preflight_")))
        device = "cuda" if membership.gpus_per_node else "cpu"
        return server_environment(python, device=device, num_threads=1, packages=link_packages(folder))
    environment = {**cuda_environment(config.layout, deterministic=config.debug.deterministic), **child_environment()}
    if membership.gpus_per_node:
        nccl_variables.agree(environment)
    return environment


def _plan(config: RunConfig, membership: Membership, devices: Mapping[str, int], reports: Mapping[str, NodeReport], left_s: float) -> Plan:
    node, roles = membership.node, membership.roles
    before = [other for other in membership.nodes[: membership.index] if roles[other] == roles[node]]
    master = reports[membership.nodes[0]]
    return Plan(
        store_address=master.address,
        store_port=master.store_port,
        keeps_store=membership.index == 0,
        backend="nccl" if membership.gpus_per_node else "gloo",
        ranks=config.world_size,
        receivers=sum(count for other, count in devices.items() if roles[other] == "server"),
        members=devices[node],
        first=sum(devices[other] for other in before),
        master_address=master.address,
        timeout_s=max(1.0, 0.4 * left_s),  # a stage that fails ends, and says so, before the round does
    )


def _summary(all_reports: Mapping[str, NodeReport | None], found: Mapping[str, Sequence[str]]) -> list[str]:
    """For people: what connections use, names that mean 127.0.1.1, and the result, which is the last line."""
    reports = {node: report for node, report in all_reports.items() if report is not None}
    lines = [f"network: {', '.join(f'{node} {report.address} ({report.interface})' for node, report in reports.items())}"]
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        values = {report.variables.get(name, "unset") for report in reports.values()}
        lines.append(f"{name}: {', '.join(sorted(values))}")
    own = [
        node for node, report in reports.items() if report.means.get(node, "").startswith("127.") and not report.address.startswith("127.")
    ]
    if own:
        lines.append(f"names that mean a loopback address on their own node, which is not used: {', '.join(own)}")
    return [*lines, f"preflight: {len(all_reports)} nodes, " + (f"{len(found)} of them unfit" if found else "all fit")]


def _write(path: Path, reports: Mapping[str, NodeReport | None], found: Mapping[str, Sequence[str]]) -> None:
    told = {node: None if report is None else asdict(report) for node, report in reports.items()}
    write_atomically(path, json.dumps({"problems": found, "nodes": told}, indent=2) + "\n")
