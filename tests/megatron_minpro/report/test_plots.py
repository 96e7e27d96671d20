from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megatron_minpro.report.moving_average import moving_average
from megatron_minpro.report.plots import plot_run


def test_a_moving_average_never_looks_ahead() -> None:
    assert moving_average([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
    assert moving_average([1.0, 2.0], 5) == [1.0, 1.5]
    with pytest.raises(ValueError, match="window = 0"):
        moving_average([1.0], 0)


def test_three_pictures_are_drawn_and_can_be_opened(tmp_path: Path) -> None:
    metrics = [{"global_step": step, "reward/trained": step / 40, "policy/entropy": 1.0 - step / 80} for step in range(40)]
    metrics.append({"global_step": 40, "batch/waiting": 2})  # a step that only samples
    before, after = {"pass_at_1": 0.34, "pass_at_8": 0.71}, {"pass_at_1": 0.86, "pass_at_8": 0.99}
    paths = plot_run(tmp_path, metrics, title="tiny", evaluation_before=before, evaluation_after=after)
    assert [path.name for path in paths] == ["reward.png", "entropy.png", "pass_at_k.png"]
    for path in paths:
        with Image.open(path) as image:
            image.verify()
            assert min(image.size) > 400


def test_a_picture_without_data_is_not_drawn(tmp_path: Path) -> None:
    paths = plot_run(
        tmp_path, [{"global_step": 0, "reward/trained": 0.5, "policy/entropy": None}], title="x", evaluation_before={}, evaluation_after={}
    )
    assert [path.name for path in paths] == ["reward.png"]
