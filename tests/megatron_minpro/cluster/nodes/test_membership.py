"""A node's place in a job, and what the run puts on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.cluster.nodes.membership import Membership
from megatron_minpro.config import load_config

REPOSITORY = Path(__file__).resolve().parents[4]
JOB = Membership(node="n0", nodes=("n0", "n1", "n2", "n3"), trainers=2, port=1, gpus_per_node=8, timeout_s=1.0)


@pytest.mark.parametrize(("node", "trainers", "words"), [("c", 1, "--node is 'c'"), ("a", 3, "--trainers is 3, expected 1 to 2")])
def test_a_place_that_does_not_exist_is_refused(node: str, trainers: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Membership(node=node, nodes=("a", "b"), trainers=trainers, port=1, gpus_per_node=0, timeout_s=1.0)


def test_gpus_and_ports_of_every_node_follow_from_the_configuration() -> None:
    endpoints = "rollout.endpoints=[http://n2:2000,http://n2:2001,http://n3:2000,http://n3:2001]"
    config = load_config(REPOSITORY / "configs/qwen3_30b_a3b.yaml", ["rollout.servers=0", endpoints])
    assert JOB.devices(config) == {"n0": 8, "n1": 8, "n2": 4, "n3": 4}  # 16 ranks; two servers of tp 2 each
    assert JOB.ports(config) == {"n0": (), "n1": (), "n2": (2000, 2001), "n3": (2000, 2001)}


def test_ranks_that_do_not_fill_the_trainer_nodes_are_refused() -> None:
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", ["world_size=1", "parallel.ep=1"])
    with pytest.raises(ValueError, match=r"^world_size: 1 ranks cannot be shared evenly by 2 trainer nodes"):
        JOB.devices(config)
