"""Four nodes of which one is unfit: every check names it, with its reason, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_minpro.cluster.installation import Installation, Package
from megatron_minpro.cluster.nodes.findings import Job, problems, trial_faults, unreachable
from megatron_minpro.cluster.nodes.needs import GIB, Needs
from megatron_minpro.cluster.nodes.report import NodeReport, ReachReport, TrialReport, from_json, to_json

NODES = ("n0", "n1", "n2", "n3")  # two train, two serve
MEANS = {node: f"10.0.0.{number}" for number, node in enumerate(NODES)}
VARIABLES = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "NCCL_SOCKET_IFNAME": "=eth0",
    "NCCL_CUMEM_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_IB_HCA": "mlx5_0",
}
SERVERS = Installation(
    role="servers",
    executable="/s/bin/python",
    environment="/s",
    python="3.11.7",
    glibc="2.36",
    driver="580.65.06",
    driver_cuda="13.0",
    torch=Package(version="2.14.1+cu130", error=None),
    cuda="13.0",
    nccl="2.30.7",
    engine=Package(version="0.5.23", error=None),
    cuda_home="/s/cuda",
    nvcc="13.0.88",
    cuda_headers="13.0",
    compiler="/usr/bin/c++",
    ninja="/s/bin/ninja",
    caches=(),
)
TRAINERS = replace(SERVERS, role="trainer", environment="/t", engine=Package(version=None, error=None))
NEEDS = Needs(checkpoint=400 * GIB, num_checkpoints=3, weights=60 * GIB, num_copies=1, host=200 * GIB, host_of_first=0)


def report_of(node: str) -> NodeReport:
    """Nothing is wrong with it."""
    trains = node in ("n0", "n1")
    return NodeReport(
        node=node,
        role="trainer" if trains else "server",
        gpus=8,
        address=MEANS[node],
        interface="eth0",
        port=4000,
        means=MEANS | {node: "127.0.1.1"},  # as Debian has it
        interfaces=("lo", "eth0", "eth1"),
        installation=TRAINERS if trains else SERVERS,
        variables=VARIABLES | {"NCCL_IB_HCA": f"mlx5_{node[1]}"},
        free_bytes=1300 * GIB,
        memory_bytes=900 * GIB,
        versions={"torch": "2.14.1"} if trains else {"torch": "2.14.1", "sglang": "0.5.23"},
    )


def judge(changes: dict[str, dict[str, Any] | None], **of_job: Any) -> dict[str, list[str]]:
    """Four good nodes, the named ones changed; None: silent."""
    reports: dict[str, NodeReport | None] = {node: report_of(node) for node in NODES}
    for node, change in changes.items():
        reports[node] = None if change is None else replace(report_of(node), **change)
    job = Job(gpus_per_node=8, devices=dict.fromkeys(NODES, 8), needs=NEEDS)
    return problems(reports, replace(job, **of_job))


def test_the_node_of_rank_0_keeps_weights_for_the_servers() -> None:
    little = {"memory_bytes": 250 * GIB}
    assert judge({"n0": little, "n1": little}) == {}
    expected = (
        "expected 200.0 GiB for its part of a checkpoint that is being written and 120.0 GiB for the weights that wait there for servers"
    )
    assert judge({"n0": little, "n1": little}, needs=replace(NEEDS, host_of_first=120 * GIB)) == {
        "n0": [f"250.0 GiB of host memory, {expected} (publish: rolling)"]
    }


def test_nothing_is_wrong_with_equal_nodes() -> None:
    """Their own names mean 127.0.1.1, and their network cards have names of their own: neither is used to reach them."""
    assert judge({}) == {}


# What is wrong with one of them -> what is said.
ON_A_TRAINER: dict[str, tuple[dict[str, Any] | None, str]] = {
    "silent": (None, "sent no report: unreachable, or its Python did not start"),
    "a GPU too few": ({"gpus": 7}, "7 GPUs, expected 8"),
    "no driver": ({"gpus": 0}, "0 GPUs, expected 8"),
    "a GPU that cannot compute": (
        {"device_faults": ("GPU 5: a small computation failed: RuntimeError: ECC",)},
        "GPU 5: a small computation failed: RuntimeError: ECC",
    ),
    "a missing path": ({"missing": ("model.path: /m does not exist",)}, "model.path: /m does not exist"),
    "no routable address": ({"address": "127.0.0.1"}, "has no address that other nodes can reach"),
    "a peer's name means loopback": (
        {"means": MEANS | {"n1": "127.0.1.1", "n3": "127.0.1.1"}},
        "n3 means 127.0.1.1 here, expected that node's address (/etc/hosts, DNS)",
    ),
    "a peer's name is unknown": ({"means": MEANS | {"n2": "nothing (Name or service not known)"}}, "n2 means nothing (Name or service not"),
    "an interface that is not there": (
        {"variables": VARIABLES | {"GLOO_SOCKET_IFNAME": "ib0"}},
        "GLOO_SOCKET_IFNAME=ib0: it has no such interface, but lo, eth0, eth1",
    ),
    "an interface of NCCL that is not there": (
        {"variables": VARIABLES | {"NCCL_SOCKET_IFNAME": "=eth"}},
        "NCCL_SOCKET_IFNAME==eth: it has no such interface",
    ),
    "cuMem on one side": (
        {"variables": VARIABLES | {"NCCL_CUMEM_ENABLE": "1"}},
        "NCCL_CUMEM_ENABLE 1, most nodes have 0",
    ),
    "a variable that others lack": (
        {"variables": VARIABLES | {"NCCL_P2P_DISABLE": "1"}},
        "NCCL_P2P_DISABLE 1, most nodes have unset",
    ),
    "a variable that it lacks": (
        {"variables": {name: value for name, value in VARIABLES.items() if name != "NCCL_NVLS_ENABLE"}},
        "NCCL_NVLS_ENABLE unset, most nodes have 0",
    ),
    "a full disk": (
        {"free_bytes": 1260 * GIB},
        "1260.0 GiB free for the run folder, expected 1261.0 GiB for logs, 3 more checkpoints of 400.0 GiB (checkpoint.keep + 1 in all) "
        "and 1 x the weights of 60.0 GiB (the exported policy, weight_sync: disk)",
    ),
    "little host memory": (
        {"memory_bytes": 150 * GIB},
        "150.0 GiB of host memory, expected 200.0 GiB for its part of a checkpoint that is being written",
    ),
    "another NCCL": ({"installation": replace(TRAINERS, nccl="2.29.7")}, "loaded NCCL 2.29.7, most nodes have 2.30.7"),
    "another CUDA": ({"installation": replace(TRAINERS, cuda="12.9")}, "CUDA of torch 12.9, most nodes have 13.0"),
    "torch that does not import": (
        {"installation": replace(TRAINERS, torch=Package(version="2.14.1+cu130", error="OSError: libcudart"))},
        "torch 2.14.1+cu130: OSError: libcudart in /t, expected one that imports",
    ),
    "an old driver": (
        {"installation": replace(TRAINERS, driver="550.1", driver_cuda="12.4")},
        "driver 550.1 serves CUDA 12.4, torch needs",
    ),
}
ON_A_SERVER: dict[str, tuple[dict[str, Any], str]] = {
    "a port in use": ({"ports_in_use": (21000, 21002)}, "ports in use that its servers need: 21000, 21002"),
    "another NCCL": ({"installation": replace(SERVERS, nccl="2.29.7")}, "loaded NCCL 2.29.7, most nodes have 2.30.7"),
    "no ninja": ({"installation": replace(SERVERS, ninja=None)}, "ninja: none on PATH, SGLang compiles with it"),
    "cuMem on one side": ({"variables": VARIABLES | {"NCCL_CUMEM_ENABLE": "1"}}, "NCCL_CUMEM_ENABLE 1, most nodes have 0"),
}


@pytest.mark.parametrize("case", ON_A_TRAINER)
def test_one_bad_trainer_node_is_named_alone(case: str) -> None:
    change, words = ON_A_TRAINER[case]
    found = judge({"n1": change})
    assert list(found) == ["n1"] and any(line.startswith(words) for line in found["n1"]), found


@pytest.mark.parametrize("case", ON_A_SERVER)
def test_one_bad_server_node_is_named_alone(case: str) -> None:
    change, words = ON_A_SERVER[case]
    found = judge({"n3": change})
    assert list(found) == ["n3"] and found["n3"][0].startswith(words), found


def test_more_processes_than_gpus_are_named_by_node() -> None:
    too_many = judge({}, devices={"n0": 8, "n1": 8, "n2": 8, "n3": 16})
    assert too_many == {"n3": ["16 GPUs of its servers (servers x rollout.tp), expected at most 8, the GPUs of a node"]}
    assert judge({}, devices={"n0": 9, "n1": 8, "n2": 0, "n3": 4}) == {
        "n0": ["9 ranks (world_size), expected at most 8, the GPUs of a node"]
    }


def test_roles_with_two_versions_of_nccl_name_both() -> None:
    """Every node of a role is like the others: the servers' environment differs from the trainer's."""
    old = {"installation": replace(SERVERS, nccl="2.29.7", torch=Package(version="2.13.0+cu130", error=None))}
    found = judge({"n2": old, "n3": old})
    assert set(found) == {"n2", "n3"}
    for lines in found.values():
        assert lines[0].startswith("torch: the trainer has 2.14.1+cu130 (/t), the servers have 2.13.0+cu130 (/s)")
        assert lines[1].startswith("NCCL: the trainer has 2.30.7 (/t), the servers have 2.29.7 (/s)")


def test_without_gpus_the_roles_may_have_different_versions() -> None:
    no_gpu = {"gpus": 0}
    old = no_gpu | {"installation": replace(SERVERS, torch=Package(version="2.13.0+cpu", error=None), ninja=None)}
    assert judge({"n0": no_gpu, "n1": no_gpu, "n2": old, "n3": old}, gpus_per_node=0) == {}
    found = judge({"n0": no_gpu, "n1": no_gpu, "n2": old, "n3": no_gpu}, gpus_per_node=0)
    assert set(found) == {"n2", "n3"}  # of two servers with two versions nobody knows which is right
    assert found["n2"] == ["torch 2.13.0+cpu, another node has 2.14.1+cu130"]


def test_a_package_is_compared_among_the_nodes_of_a_role() -> None:
    found = judge({"n1": {"versions": {"torch": "2.13.0"}}})
    assert set(found) == {"n0", "n1"} and found["n1"] == ["torch 2.13.0, another node has 2.14.1"]
    three = {"role": "trainer", "versions": {"torch": "2.14.1"}, "installation": TRAINERS}
    assert judge({"n2": three, "n3": three | {"versions": {"torch": "2.13.0"}}}) == {"n3": ["torch 2.13.0, most nodes have 2.14.1"]}


def test_two_nodes_with_one_address_are_both_named() -> None:
    assert judge({"n3": {"address": "10.0.0.2"}}) == {node: ["has the address 10.0.0.2, as another node has"] for node in ("n2", "n3")}


def test_a_server_node_needs_no_room_for_checkpoints() -> None:
    assert judge({"n3": {"free_bytes": GIB, "memory_bytes": GIB}}) == {}
    assert judge({"n0": {"free_bytes": GIB, "memory_bytes": GIB}}, needs=None) == {}


def reach(changes: dict[str, dict[str, Any] | None]) -> dict[str, list[str]]:
    reports: dict[str, ReachReport | None] = {node: ReachReport(node=node) for node in NODES}
    for node, change in changes.items():
        reports[node] = None if change is None else ReachReport(node=node, **change)
    return unreachable(reports)


def test_a_node_that_others_cannot_reach_is_named() -> None:
    assert reach({}) == {}
    refused = {"unreachable": {"n2": "10.0.0.2: Connection refused"}}
    found = reach({"n0": refused, "n1": refused, "n3": refused})
    assert list(found) == ["n2"] and found["n2"][0] == "cannot be reached from n0 (10.0.0.2: Connection refused)"


def test_a_node_that_reaches_nobody_is_named_alone() -> None:
    lost = {other: "timed out" for other in NODES if other != "n1"}
    assert reach({"n1": {"unreachable": lost}}) == {"n1": ["cannot reach n0 (timed out), n2 (timed out), n3 (timed out)"]}


def test_a_node_with_another_time_is_named_alone() -> None:
    """n1 is an hour ahead: the others see it so, and it sees all of them behind."""
    changes: dict[str, dict[str, Any] | None] = {node: {"clocks_s": {other: 0.0 for other in NODES} | {"n1": 3600.0}} for node in NODES}
    changes["n1"] = {"clocks_s": {other: -3600.0 for other in NODES if other != "n1"}}
    assert reach(changes) == {"n1": ["its clock is +3600 s off the others'"]}
    assert reach({node: {"clocks_s": {"n0": 2.0, "n3": -4.0}} for node in NODES}) == {}


def test_a_node_with_a_run_folder_of_its_own_is_named() -> None:
    found = reach({"n2": {"unseen": ("n0", "n1", "n3")}})
    assert found == {"n2": ["does not see in the run folder what n0, n1, n3 wrote there; expected one file system"]}


def test_a_node_that_falls_silent_is_named_in_every_round() -> None:
    assert reach({"n3": None}) == {"n3": ["fell silent after its report"]}
    reports: dict[str, TrialReport | None] = {node: TrialReport(node=node) for node in NODES}
    assert trial_faults(reports | {"n3": None}) == {"n3": ["fell silent in the trial of sums and broadcast"]}


def test_a_node_whose_ranks_fail_is_named_with_their_words() -> None:
    reports: dict[str, TrialReport | None] = {node: TrialReport(node=node) for node in NODES}
    assert trial_faults(reports) == {}
    failed = TrialReport(node="n1", faults=("rank 9: a sum over all ranks with NCCL: not done in time",))
    assert trial_faults(reports | {"n1": failed}) == {"n1": ["rank 9: a sum over all ranks with NCCL: not done in time"]}


def test_a_report_survives_the_way_through_json() -> None:
    for report in (report_of("n0"), report_of("n3"), replace(report_of("n3"), installation=None)):
        assert from_json(NodeReport, to_json(report)) == report
