"""Processes that stand for the nodes of a job: they try what a run does, agree, and name who does not fit."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from rollout.ports import free_ports
from rollout.sglang.environment import default_server_python

REPOSITORY = Path(__file__).resolve().parents[4]


def run_on(
    nodes: tuple[str, ...], tmp_path: Path, ports: list[int], environments: Mapping[str, dict[str, str]]
) -> dict[str, tuple[int, str]]:
    """`minpro doctor` once for each node, all on this machine: the last one serves, the others train. Exit code and words, by node."""
    (tmp_path / "run").mkdir()
    endpoints = ",".join(f"http://{nodes[-1]}:{port}" for port in ports)
    settings = [f"output_dir={tmp_path}", "name=run", f"model.path={tmp_path / 'model'}", "rollout.servers=0"]
    command = [sys.executable, "-m", "megatron_minpro.cli", "doctor", "configs/tiny_moe_cpu.yaml", *settings]
    command += [f"rollout.endpoints=[{endpoints}]", "--peers", ",".join(nodes), "--trainers", str(len(nodes) - 1), "--gpus", "0"]
    command += ["--port", str(free_ports("0.0.0.0", 1)[0]), "--timeout-s", "600"]
    usual = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    running = {
        node: subprocess.Popen(
            [*command, "--node", node],
            cwd=REPOSITORY,
            env={**usual, **environments.get(node, {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in nodes
    }
    said = {node: process.communicate()[0] for node, process in running.items()}
    return {node: (process.returncode, said[node]) for node, process in running.items()}


@pytest.mark.ranks
def test_fit_nodes_add_up_broadcast_and_leave_a_report(tmp_path: Path) -> None:
    nodes = ("localhost", "127.0.0.2", "127.0.0.3")
    results = run_on(nodes, tmp_path, free_ports("0.0.0.0", 2), {})
    assert {node: code for node, (code, _) in results.items()} == dict.fromkeys(nodes, 0), results
    said = results["localhost"][1].splitlines()
    assert said[-1] == "preflight: 3 nodes, all fit" and "GLOO_SOCKET_IFNAME: lo" in said
    assert all(results[node][1] == "" for node in nodes[1:])
    report = json.loads((tmp_path / "run/preflight.json").read_text())
    assert report["problems"] == {} and list(report["nodes"]) == list(nodes)
    trainer, server = (report["nodes"][node] for node in nodes[1:])
    # What was broadcast went from one environment's torch to the other's.
    assert trainer["installation"]["executable"] == sys.executable
    assert Path(server["installation"]["environment"]) == default_server_python().parent.parent.absolute()
    assert "sglang" in server["versions"] and "sglang" not in trainer["versions"]
    assert trainer["memory_bytes"] > 2**30 and trainer["free_bytes"] > 2**30
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]


def test_a_node_imports_no_torch_to_look_at_itself() -> None:
    """Its processes do, in the environment of their role. A second import would take most of the time of a preflight."""
    program = "import sys, megatron_minpro.cluster.nodes.check; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.ranks
def test_every_node_names_those_that_are_unfit(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho cannot load torch >&2\nexit 3\n")
    python.chmod(0o755)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        environments = {"localhost": {"GLOO_SOCKET_IFNAME": "absent0"}, "127.0.0.2": {"MINPRO_SERVER_PYTHON": str(python)}}
        results = run_on(("localhost", "127.0.0.2"), tmp_path, [port], environments)
    errors = {said.splitlines()[-1] for _, said in results.values()}
    assert len(errors) == 1 and all(code == 1 and "Traceback" not in said for code, said in results.values()), results
    [error] = errors
    assert error.startswith("minpro: error: preflight: localhost: GLOO_SOCKET_IFNAME=absent0: it has no such interface")
    assert "127.0.0.2: the Python of its server environment ended with exit code 3: cannot load torch" in error
    assert f"ports in use that its servers need: {port}. Submit again with --exclude=localhost,127.0.0.2, or repair" in error
    assert list(json.loads((tmp_path / "run/preflight.json").read_text())["problems"]) == ["localhost", "127.0.0.2"]
