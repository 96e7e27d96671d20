"""`minpro train --dry-run --slurm`: nodes by hand, a command that a shell understands, and a refusal of what does not fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_minpro import cli
from megatron_minpro.cluster.planned_stop import SCRIPT_SIGNAL_S, SCRIPT_STOP_WITHIN_S, PlannedStop
from megatron_minpro.cluster.slurm import SCRIPT, NodeSplit, sbatch_command, split_nodes
from megatron_minpro.config import load_config

CONFIG = "configs/qwen3_30b_a3b.yaml"


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ((), 8, (2, 2, 4)),  # 16 ranks; 8 servers of 2 GPUs, 4 a node
        (("world_size=64", "rollout.servers=6"), 8, (8, 2, 3)),
        (("rollout.servers=3", "rollout.tp=8"), 8, (2, 3, 1)),
        (("rollout.servers=2", "rollout.tp=4"), 4, (4, 2, 1)),
    ],
)
def test_ranks_and_servers_get_whole_nodes(settings: tuple[str, ...], gpus: int, expected: tuple[int, int, int]) -> None:
    split = split_nodes(load_config(CONFIG, settings), gpus_per_node=gpus)
    assert (split.trainers, split.servers, split.servers_per_node) == expected
    assert split.nodes == expected[0] + expected[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("world_size=24", "parallel.ep=8"), None),
        (("world_size=8", "parallel.ep=4", "--gpus-per-node=5"), "world_size: 8 ranks do not fill nodes of 5 GPUs"),
        (("rollout.servers=5",), "rollout.servers: 5 of 2 GPUs cannot be shared evenly by 2 nodes of 8"),
        (("rollout.servers=2", "rollout.tp=16"), "rollout.tp: 16, expected at most 8"),
        (("rollout.servers=0", "rollout.endpoints=['http://n0:1']"), "rollout.servers: 0 with endpoints"),
        (("actor.recompute=none",), "needs 91.4 GB on a rank, h100 holds 76.0 GB; largest part: activations"),
        (("--hardware=h900",), "hardware: 'h900' does not exist; did you mean"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(settings: tuple[str, ...], words: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["train", CONFIG, "--dry-run", "--slurm", *settings])
    said = capsys.readouterr().err
    if words is None:
        assert (code, said) == (0, "")
    else:
        assert code == 2 and words in said and said.count("\n") == 1


def test_what_is_too_much_for_one_gpu_may_fit_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", CONFIG, "--dry-run", "--slurm", "--hardware", "h200", "actor.recompute=none"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:3] == [
        "sbatch slurm/qwen3_30b_a3b.sbatch actor.recompute=none",
        "nodes 1 to 2 train: 16 ranks, 8 a node",
        "nodes 3 to 4 serve: 8 SGLang servers of 2 GPUs, 4 a node",
    ]
    assert "91.4" in said and "of 137.0" in said


def test_the_command_says_what_differs_from_the_scripts_own_values() -> None:
    split = NodeSplit(trainers=8, servers=2, servers_per_node=3, gpus_per_node=4)
    overrides = ["world_size=32", "rollout.servers=6", "name=my run", "seed=3", "prompts.options={split: train}"]
    stop = PlannedStop(piece="a mini-batch", piece_s=100.0, checkpoint_bytes=2.25e12)
    command = sbatch_command(Path("configs/mine.yaml"), overrides, Path("runs/my run"), split, stop)
    assert shlex.split(command) == [
        "CONFIG=configs/mine.yaml",
        "RUN_DIR=runs/my run",
        "TRAINER_NODES=8",
        "SERVERS_PER_NODE=3",
        "STOP_WITHIN=2400",
        "sbatch",
        "--nodes=10",
        "--gpus-per-node=4",
        "--signal=B:USR1@2700",
        "slurm/qwen3_30b_a3b.sbatch",
        "seed=3",
        "prompts.options={split: train}",
    ]


def test_the_scripts_own_times_are_those_that_a_stop_is_held_against() -> None:
    script = Path(SCRIPT).read_text()
    assert f'"${{STOP_WITHIN:={SCRIPT_STOP_WITHIN_S}}}"' in script and f"#SBATCH --signal=B:USR1@{SCRIPT_SIGNAL_S}\n" in script
    enough = PlannedStop(piece="a mini-batch", piece_s=600.0, checkpoint_bytes=9e11)
    assert (enough.seconds, enough.variables, enough.options) == (1500, (), ())


def test_a_stop_of_the_shipped_run_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", CONFIG, "--dry-run", "--slurm"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # 30.5e9 parameters: bf16 weights, those that sample a missing batch, fp32 weights, two moments: 16 bytes each.
    assert re.search(r"a stop takes up to \d+ s: the scoring of a batch \d+ s, a checkpoint of 489 GB 489 s at 1 GB/s", said)
    assert cli.run(["train", CONFIG, "--dry-run", "--slurm", "staleness=0"]) == 0
    assert "a checkpoint of 427 GB 427 s" in " ".join(capsys.readouterr().out.split()), "the serial schedule keeps no second weights"


def test_it_is_a_dry_run_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", CONFIG, "--slurm"]) == 2
    assert "--slurm: expected --dry-run beside it" in capsys.readouterr().err
