"""Where a case's ranks go, and that whatever becomes of them is a row."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.scaling.batch import synthetic_sequences
from megatron_minpro.scaling.measure import Nodes, measure_case, model_folder, nodes_needed, run_ranks, was_killed
from megatron_minpro.scaling.rows import describe
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.planner.hardware import read_hardware
from tests.megatron_minpro.conftest import HIDING
from tests.megatron_minpro.scaling.test_rows import SETTINGS, SHAPE, TRAINING, case
from tests.megatron_minpro.scaling.test_study import CONFIG

HERE = Nodes(count=1, rank=0, gpus=None, address="127.0.0.1", port=29400)


@pytest.mark.parametrize(
    ("world_size", "nodes", "gpus", "expected"),
    [(8, 1, 8, 1), (8, 4, 8, 1), (16, 4, 8, 2), (12, 2, 8, 2), (4, 1, None, 1), (4, 2, None, 2), (1, 2, None, 1)],
)
def test_ranks_fill_as_few_machines_as_hold_them(world_size: int, nodes: int, gpus: int | None, expected: int) -> None:
    assert nodes_needed(world_size, replace(HERE, count=nodes, gpus=gpus)) == expected


def test_too_few_gpus_are_a_row_and_no_process(tmp_path: Path) -> None:
    row = describe(case(16, 16, 16, "strong"), SHAPE, TRAINING, SETTINGS, kind="measured")
    answers = [
        measure_case(
            row,
            case(16, 16, 16, "strong"),
            tmp_path,
            tmp_path,
            replace(HERE, gpus=8, rank=rank),
            shape=SHAPE,
            hardware=read_hardware("h100"),
            capabilities=detect(),
            timeout_s=1.0,
        )
        for rank in (0, 1)
    ]
    assert answers == [replace(row, reason="16 ranks need 2 machines of 8 GPUs, there are 1"), None]
    assert row.status == "failed" and list(tmp_path.iterdir()) == []


def request(world_size: int) -> dict[str, object]:
    return {"task": "measure", "layout": asdict(ParallelLayout(world_size=world_size)), "sequences": 4}


@pytest.mark.ranks
def test_ranks_without_an_end_or_a_study_are_failures_with_a_reason(tmp_path: Path, hostile_folder: Path) -> None:
    late = run_ranks("late", request(1), tmp_path, tmp_path, HERE, 1, timeout_s=0.2)
    assert late["status"] == "failed" and late["reason"].startswith("no result within 0 s")
    lost = run_ranks("lost", request(1), tmp_path, tmp_path, HERE, 1, timeout_s=120.0)  # the folder holds no study
    assert lost["status"] == "failed" and lost["reason"].startswith("the ranks ended with exit code 1 (log: ")
    log = (tmp_path / "logs" / "lost.log").read_text()
    assert f"{tmp_path / 'study.json'}" in log and HIDING not in log  # the working folder has modules of the same names as ours


def test_a_killed_rank_is_told_from_those_that_fail_with_it() -> None:
    consequence = "Root Cause (first observed failure):\n[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 6)\n"
    assert not was_killed(consequence)
    assert was_killed(f"Failures:\n[1]:\n  traceback : Signal 9 (SIGKILL) received by PID 7\n---\n{consequence}")


def test_without_a_model_random_weights_are_made_once(tmp_path: Path) -> None:
    config = load_config(CONFIG, [f"model.path={tmp_path / 'absent'}"])
    made = model_folder(config, tmp_path)
    assert made == model_folder(config, tmp_path) != tmp_path / "absent"
    assert (made / "config.json").exists()
    with pytest.raises(ValueError, match=r"absent does not exist and model\.warm_up is null"):
        model_folder(load_config(CONFIG, [f"model.path={tmp_path / 'absent'}", "model.warm_up=null"]), tmp_path)


def test_made_up_sequences_are_of_one_length_and_the_same_everywhere() -> None:
    first, again = (synthetic_sequences(count=3, positions=10, prompt_tokens=4, vocab_size=24, seed=1) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.token_ids.equal(other.token_ids) and one.streams["behaviour_logprobs"].equal(other.streams["behaviour_logprobs"])
        # 11 tokens, of which the last 7 are a response: scored by positions 3 to 9.
        assert (one.num_positions, one.loss_mask.tolist()) == (10, [False] * 3 + [True] * 7)
        assert not one.streams["advantages"][:3].any()
    assert [float(each.streams["advantages"][-1]) for each in first] == [1.0, -1.0, 1.0]
