"""Processes that stand for the nodes of a job: they find each other, agree, and name who does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_minpro.cluster.nodes import Membership
from rollout.ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[3]


def run_on(nodes: list[str], tmp_path: Path, *extra: str, peers: str, timeout_s: int = 30) -> dict[str, tuple[int, str]]:
    """`minpro doctor` once for each node, all on this machine. Exit code and what was said, by node."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    port = str(free_ports("127.0.0.1", 1)[0])
    settings = [f"output_dir={tmp_path}", "name=run", f"model.path={tmp_path / 'model'}"]
    command = [sys.executable, "-m", "megatron_minpro.cli", "doctor", "configs/tiny_moe_cpu.yaml", *settings, "--peers", peers]
    command += ["--port", port, "--trainers", "2", "--timeout-s", str(timeout_s), *extra]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = {
        node: subprocess.Popen(
            [*command, "--node", node], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for node in nodes
    }
    said = {node: process.communicate(timeout=120)[0] for node, process in running.items()}
    return {node: (process.returncode, said[node]) for node, process in running.items()}


@pytest.mark.ranks
def test_fit_nodes_agree_and_leave_a_report(tmp_path: Path) -> None:
    nodes = ["localhost", "a", "b"]
    results = run_on(nodes, tmp_path, "--gpus", "0", peers=",".join(nodes))
    assert {node: code for node, (code, _) in results.items()} == dict.fromkeys(nodes, 0), results
    assert results["localhost"][1].strip() == "preflight: 3 nodes, all fit"
    report = json.loads((tmp_path / "run/preflight.json").read_text())
    assert report["problems"] == {} and set(report["nodes"]) == set(nodes)
    assert "sglang" in report["nodes"]["b"]["versions"]  # the third serves
    assert "sglang" not in report["nodes"]["a"]["versions"]


@pytest.mark.ranks
def test_a_silent_node_and_missing_gpus_are_named_on_every_other_node(tmp_path: Path) -> None:
    results = run_on(["localhost", "a"], tmp_path, "--gpus", "8", peers="localhost,a,b", timeout_s=12)
    for code, said in results.values():
        assert code == 1
        error = said.strip().splitlines()[-1]
        assert error.startswith("minpro: error: preflight: localhost: 0 GPUs, expected 8; a: 0 GPUs, expected 8; b: sent no report")
        assert error.endswith("--exclude=localhost,a,b, or repair")
        assert "Traceback" not in said


@pytest.mark.parametrize(("node", "trainers", "words"), [("c", 1, "--node is 'c'"), ("a", 3, "--trainers is 3, expected 1 to 2")])
def test_a_place_that_does_not_exist_is_refused(node: str, trainers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Membership(node=node, nodes=("a", "b"), trainers=trainers, port=1, gpus_per_node=0, timeout_s=1.0)
