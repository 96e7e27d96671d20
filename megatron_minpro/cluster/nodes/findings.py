"""What is wrong with a job's nodes, from their reports alone. One check is one pure function: node -> lines; fit nodes are left out."""

from __future__ import annotations

import ipaddress
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_minpro.cluster.installation import Installation, broken, differences, faults
from megatron_minpro.cluster.nodes.needs import GIB, Needs
from megatron_minpro.cluster.nodes.report import NodeReport, ReachReport, TrialReport

MAX_CLOCK_DIFFERENCE_S = 5.0
# They may differ: nodes have interfaces and network cards of their own.
_OF_A_NODE = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")

Reports = Mapping[str, NodeReport]
Found = dict[str, list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the nodes are measured by.

    gpus_per_node: that each must show; 0 on machines without. devices: node -> GPUs that the run uses on it. needs: None where the model's
    sizes are not known.
    """

    gpus_per_node: int
    devices: Mapping[str, int]
    needs: Needs | None


def problems(reports: Mapping[str, NodeReport | None], job: Job) -> Found:
    """Everything that the reports show. A node that sent none is named."""
    present = {node: report for node, report in reports.items() if report is not None}
    checks: Sequence[Callable[[Reports, Job], Found]] = (
        _lacks_something,
        _gpus,
        _too_many_processes,
        _versions,
        _installations,
        _variables,
        _addresses,
        _interfaces,
        _ports,
        _disk,
        _memory,
    )
    found = merge(*(check(present, job) for check in checks))
    silent = {node: ["sent no report: unreachable, or its Python did not start (see its log)"] for node in reports if node not in present}
    merged = merge(silent, found)
    return {node: merged[node] for node in reports if node in merged}


def merge(*found: Mapping[str, Sequence[str]]) -> Found:
    """All lines of each node."""
    merged: Found = {}
    for each in found:
        for node, lines in each.items():
            merged.setdefault(node, []).extend(lines)
    return {node: lines for node, lines in merged.items() if lines}


def _of_each(reports: Reports, line: Callable[[NodeReport], str | None]) -> Found:
    found = {node: line(report) for node, report in reports.items()}
    return {node: [text] for node, text in found.items() if text is not None}


def _lacks_something(reports: Reports, job: Job) -> Found:
    return {node: list(report.missing) for node, report in reports.items()}


def _gpus(reports: Reports, job: Job) -> Found:
    counts = _of_each(
        reports, lambda report: None if report.gpus == job.gpus_per_node else f"{report.gpus} GPUs, expected {job.gpus_per_node}"
    )
    return merge(counts, {node: report.device_faults for node, report in reports.items()})


def _too_many_processes(reports: Reports, job: Job) -> Found:
    """More ranks, or more servers x rollout.tp, than GPUs."""

    def line(report: NodeReport) -> str | None:
        used = job.devices[report.node]
        if not job.gpus_per_node or used <= job.gpus_per_node:
            return None
        what = "ranks (world_size)" if report.role == "trainer" else "GPUs of its servers (servers x rollout.tp)"
        return f"{used} {what}, expected at most {job.gpus_per_node}, the GPUs of a node"

    return _of_each(reports, line)


def _versions(reports: Reports, job: Job) -> Found:
    """Compared among the nodes of a role, which all have the same packages."""
    found: Found = {}
    for role in ("trainer", "server"):
        found |= _odd(
            {node: report.versions for node, report in reports.items() if report.role == role}, "most nodes have", "another node has"
        )
    return found


def _installations(reports: Reports, job: Job) -> Found:
    """What stops a role in its own environment; torch, CUDA and loaded NCCL that are not the same: on nodes of a role, with GPUs on all."""
    known = {node: report.installation for node, report in reports.items() if report.installation is not None}
    found = {node: broken(each) + (faults(each) if job.gpus_per_node else []) for node, each in known.items()}
    trainers, servers = (
        {node: each for node, each in known.items() if each.role == "trainer"},
        {node: each for node, each in known.items() if each.role == "servers"},
    )
    if not job.gpus_per_node:
        return merge(found, _odd_installations(trainers), _odd_installations(servers))
    if trainers and servers and all(len(set(map(_must_agree, each.values()))) == 1 for each in (trainers, servers)):
        lines = differences(next(iter(trainers.values())), next(iter(servers.values())))
        return merge(found, dict.fromkeys(servers, lines))
    return merge(found, _odd_installations(known))


def _must_agree(found: Installation) -> tuple[tuple[str, str], ...]:
    return ("torch", found.torch.version or "none"), ("CUDA of torch", found.cuda or "none"), ("loaded NCCL", found.nccl or "none")


def _odd_installations(known: Mapping[str, Installation]) -> Found:
    return _odd({node: dict(_must_agree(each)) for node, each in known.items()}, "most nodes have", "another node has")


def _variables(reports: Reports, job: Job) -> Found:
    """Trainer ranks and servers share communicators, whose members must agree."""
    common = {node: {name: value for name, value in report.variables.items() if name not in _OF_A_NODE} for node, report in reports.items()}
    names = sorted({name for variables in common.values() for name in variables})
    return _odd(
        {node: {name: variables.get(name, "unset") for name in names} for node, variables in common.items()},
        "most nodes have",
        "others have",
    )


def _odd(values: Mapping[str, Mapping[str, str]], most_have: str, other_has: str) -> Found:
    """Who has another value than most; after a tie all are suspicious.

    Args:
        values: node -> name -> value.
        most_have, other_has: words before the usual value, and before the others after a tie.
    """
    found: Found = {node: [] for node in values}
    for node, own in values.items():
        for name, value in own.items():
            counts = Counter(other.get(name, "absent") for other in values.values())
            most = max(counts.values())
            usual = [each for each, count in counts.items() if count == most]
            if usual != [value]:
                rivals = ", ".join(each for each in usual if each != value)
                found[node].append(f"{name} {value}, {most_have if most > 1 else other_has} {rivals}")
    return found


def _addresses(reports: Reports, job: Job) -> Found:
    """No address that leads to it, the address of another node, or another node's name that means something else here.

    Its own name may mean 127.0.1.1, as on Debian: nobody uses that.
    """
    owners = Counter(report.address for report in reports.values())
    alone = all(_is_loopback(report.address) for report in reports.values())  # processes that stand for nodes

    def line(report: NodeReport) -> str | None:
        if alone:
            return None
        if _is_loopback(report.address):
            return "has no address that other nodes can reach"
        if owners[report.address] > 1:
            return f"has the address {report.address}, as another node has"
        wrong = [f"{node} means {where}" for node, where in report.means.items() if node != report.node and not _is_routable(where)]
        return f"{', '.join(wrong)} here, expected that node's address (/etc/hosts, DNS)" if wrong else None

    return _of_each(reports, line)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _is_routable(meaning: str) -> bool:
    """Whether a name's meaning is an address, and not of the machine itself."""
    try:
        return not _is_loopback(meaning)
    except ValueError:
        return False


def _interfaces(reports: Reports, job: Job) -> Found:
    """gloo or NCCL are told to use an interface that is not there."""

    def line(report: NodeReport) -> str | None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            value = report.variables.get(name, "")
            if not value or value.startswith("^"):  # all but these
                continue
            wanted = value.removeprefix("=").split(",")
            exact = name.startswith("GLOO") or value.startswith("=")  # else NCCL takes all that begin so
            if not any(each == want or (not exact and each.startswith(want)) for each in report.interfaces for want in wanted):
                return f"{name}={value}: it has no such interface, but {', '.join(report.interfaces)}"
        return None

    return _of_each(reports, line)


def _ports(reports: Reports, job: Job) -> Found:
    return _of_each(
        reports,
        lambda report: f"ports in use that its servers need: {', '.join(map(str, report.ports_in_use))}" if report.ports_in_use else None,
    )


def _disk(reports: Reports, job: Job) -> Found:
    def line(report: NodeReport) -> str | None:
        if job.needs is None or report.role == "server" or report.free_bytes >= job.needs.disk:
            return None
        return f"{report.free_bytes / GIB:.1f} GiB free for the run folder, expected {job.needs.disk_text}"

    return _of_each(reports, line)


def _memory(reports: Reports, job: Job) -> Found:
    def line(report: NodeReport) -> str | None:
        if job.needs is None or report.role == "server":
            return None
        kept = job.needs.host_of_first if report.node == next(iter(job.devices)) else 0
        if report.memory_bytes >= job.needs.host + kept:
            return None
        needed = f"{job.needs.host / GIB:.1f} GiB for its part of a checkpoint that is being written"
        beside = f" and {kept / GIB:.1f} GiB for the weights that wait there for servers (publish: rolling)" if kept else ""
        return f"{report.memory_bytes / GIB:.1f} GiB of host memory, expected {needed}{beside}"

    return _of_each(reports, line)


def unreachable(reports: Mapping[str, ReachReport | None]) -> Found:
    """Which node the others cannot reach, does not see their files, or has another time than they have.

    A node that cannot reach most of the others is the one that is named; else those that it cannot reach.
    """
    found: Found = {}
    present = {node: report for node, report in reports.items() if report is not None}
    for node, report in present.items():
        if report.unseen:
            found.setdefault(node, []).append(
                f"does not see in the run folder what {', '.join(report.unseen)} wrote there; expected one file system"
            )
        lost = report.unreachable
        if lost and 2 * len(lost) >= len(reports):
            found.setdefault(node, []).append(f"cannot reach {', '.join(f'{other} ({reason})' for other, reason in lost.items())}")
            continue
        for other, reason in lost.items():
            found.setdefault(other, []).append(f"cannot be reached from {node} ({reason})")
    for node in present:
        seen = [report.clocks_s[node] for report in present.values() if node in report.clocks_s]
        if seen and abs(ahead := statistics.median(seen)) > MAX_CLOCK_DIFFERENCE_S:
            found.setdefault(node, []).append(f"its clock is {ahead:+.0f} s off the others'")
    silent = {node: ["fell silent after its report"] for node in reports if node not in present}
    return merge(silent, {node: found[node] for node in reports if node in found})


def trial_faults(reports: Mapping[str, TrialReport | None]) -> Found:
    """Whose processes failed, or did not finish, while all took part."""
    return {
        node: ["fell silent in the trial of sums and broadcast"] if report is None else list(report.faults)
        for node, report in reports.items()
        if report is None or report.faults
    }
