"""Time limits of a run's servers: from its settings and its model's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.config import load_config
from megatron_minpro.config.settings import ConfigError
from megatron_minpro.run.server_limits import hang_is_over_s, progress_timeout_s, weight_limits

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize(("weight_sync", "loading_s"), [("collective", 0), ("disk", 3)])
def test_a_hang_is_longer_than_any_step_of_a_weight_update(tmp_path: Path, weight_sync: str, loading_s: float) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(150_000_000)
    settings = [f"model.path={tmp_path}", f"rollout.weight_sync={weight_sync}", "rollout.start_timeout_s=50"]
    config = load_config(CONFIGS / "tiny_moe_cpu.yaml", settings)
    limits = weight_limits(config)
    assert (limits.control_s, limits.step_s, limits.moving(300_000_000)) == (30, 60, 63)
    assert progress_timeout_s(config) == 120 + loading_s
    assert progress_timeout_s(config) > limits.moving(512 * 2**20 if weight_sync == "collective" else 300_000_000)
    assert hang_is_over_s(config) == 170 + loading_s


def test_a_hang_that_is_noticed_before_the_trainer_gives_up_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"progress_timeout_s = 60: expected more than weight_sync_timeout_s = 60"):
        load_config(CONFIGS / "tiny_moe_cpu.yaml", ["rollout.progress_timeout_s=60"])
