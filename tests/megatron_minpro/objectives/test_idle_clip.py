"""When a run is told that its clip never acts."""

from __future__ import annotations

import pytest

from megatron_minpro.objectives.idle_clip import idle_clip


@pytest.mark.parametrize(
    ("metrics", "warned"),
    [
        ({"ratio/unit": 1.0, "batch/lag_max": 15}, True),
        ({"ratio/unit": 1.0, "batch/lag_max": 0}, False),  # on-policy, one update a step: as it should be
        ({"ratio/unit": 0.9999, "batch/lag_max": 15}, False),
        ({"ratio/unit": None, "batch/lag_max": 15}, False),  # no trained token
        ({"reward/sampled": 0.5}, False),  # a step that only samples
    ],
)
def test_all_ratios_one_at_a_lag_are_suspicious(metrics: dict[str, float | None], warned: bool) -> None:
    warning = idle_clip(metrics)
    assert (warning is not None) == warned
    if warning is not None:
        assert "up to 15 updates ahead" in warning and "behaviour log-probs" in warning and "learning rate" in warning
