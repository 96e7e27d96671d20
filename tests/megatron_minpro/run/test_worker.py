"""What a trainer rank decides from its configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.run.worker import collective_timeout_s

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("settings", "times_asked"),
    [
        (["evaluation=null"], 1),
        ([], 2),  # the held-out measurement, then the batch
        (["rollout.dynamic_sampling={equal: reward, max_rounds: 10}"], 11),
    ],
)
def test_waiting_ranks_outlast_everything_that_one_step_asks(settings: list[str], times_asked: int) -> None:
    limits = ["rollout.start_timeout_s=100", "rollout.progress_timeout_s=90", "rollout.weight_sync_timeout_s=20"]
    limits += ["rollout.request_timeout_s=500", "rollout.max_retries=3", "model.path=absent"]
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*limits, *settings])
    assert collective_timeout_s(config) == 600 + 100 + 90 + 20 + 4 * 500 * times_asked
