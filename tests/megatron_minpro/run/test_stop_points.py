"""Two ranks, real actors and checkpoints: whatever state between two updates is continued, the numbers are those of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_minpro.config import dump_config, load_config
from megatron_minpro.run.base_model import write_initial_model
from tests.megatron_minpro.run.stop_points_ranks import CASES
from tests.rank_pool import RankPool

pytestmark = pytest.mark.ranks
REPOSITORY = Path(__file__).resolve().parents[3]
UPDATES = 2


@pytest.fixture(scope="module")
def found(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 found."""
    folder = tmp_path_factory.mktemp("stop_points")
    settings = (
        f"output_dir={folder}",
        f"model.path={folder / 'model'}",
        "staleness=1",
        "num_global_steps=3",
        f"actor.updates_per_step={UPDATES}",
        f"rollout.prompts_per_step={UPDATES}",
        "rollout.group_size=2",
        "rollout.logprob_gap_action=warn",
        "evaluation=null",
        "checkpoint.every=100",
        "tracking.log_level=error",
    )
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", settings)
    write_initial_model(config.model, config.prompts, folder / "model")
    (folder / "config.yaml").write_text(dump_config(config))
    ranks.run(Path(__file__).parent / "stop_points_ranks.py", folder, world_size=2, timeout_s=600)
    return json.loads((folder / "found_0.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_saving_between_updates_changes_no_number(case: str, found: dict[str, Any]) -> None:
    assert found[case]["saved"] == found[case]["whole"]


@pytest.mark.parametrize("case", CASES)
def test_a_state_between_any_two_updates_continues_bit_for_bit(case: str, found: dict[str, Any]) -> None:
    whole = found[case]["whole"]
    assert len(whole["tokens"]) == 3 * 2, "two groups of each batch, each in an update of its own"
    for checkpoint, again in found[case]["continued"].items():
        tokens = {name: whole["tokens"].get(name) for name in again["tokens"]}
        assert again == {**whole, "lines": whole["lines"][again["first_line"] :], "tokens": tokens, "first_line": again["first_line"]}, (
            checkpoint
        )
    assert all(found[name]["whole"] == whole for name in CASES), "all schedules agree"
    updates = "0001", f"{UPDATES:04d}"  # in the middle of an update, and while the batch under way is waited for
    expected_names = {
        "serial": [f"step_00000{step}_update_000{m}_sampled" for step in (1, 2) for m in (0, 1)],
        "overlapped": [f"step_00000{step}_update_{m}" for step in (1, 2) for m in updates],
    }
    expected_names["rolling"] = expected_names["overlapped"]
    assert sorted(found[case]["continued"]) == [*expected_names[case], "step_000003_update_0001"]
