"""Which steps are traced, and what is said beside them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_minpro.config import ConfigError, load_config
from megatron_minpro.run.profiling import StepProfiler, predict_phases, write_phases

CONFIG = Path(__file__).resolve().parents[3] / "configs/tiny_moe_cpu.yaml"


@pytest.mark.parametrize(("text", "expected"), [("null", None), ("3", (3, 3)), ("3-5", (3, 5)), ("0-0", (0, 0))])
def test_steps_are_a_range_or_one(text: str, expected: tuple[int, int] | None) -> None:
    assert load_config(CONFIG, [f"profile.steps={text}"]).profile.first_and_last == expected


@pytest.mark.parametrize("text", ["5-3", "3:5", "-1", "true"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        load_config(CONFIG, [f"profile.steps={text}"])


def annotations(path: Path) -> set[str]:
    with gzip.open(path) as file:
        return {event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"}


def test_exactly_the_asked_steps_are_in_the_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, steps=(2, 3), rank=1)
    for step in range(6):
        profiler.at_step(step)
        with torch.profiler.record_function(f"phase of {step}"):
            torch.ones(4).sum()
    profiler.close()
    [path] = (tmp_path / "profile").iterdir()
    assert path.name == "steps_2-3_rank_1.pt.trace.json.gz"
    assert annotations(path) == {"global step 2", "phase of 2", "global step 3", "phase of 3"}


def test_a_run_that_ends_early_keeps_what_was_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, steps=(1, 9), rank=0)
    for step in range(3):
        profiler.at_step(step)
    profiler.close()
    assert annotations(tmp_path / "profile/steps_1-2_rank_0.pt.trace.json.gz") == {"global step 1", "global step 2"}


def test_without_steps_nothing_is_written(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, steps=None, rank=0)
    profiler.at_step(0)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_measured_phases_stand_beside_predicted_ones(tmp_path: Path) -> None:
    config = load_config(CONFIG, ["profile.steps=1-2", f"model.path={tmp_path / 'absent'}"])
    (tmp_path / "profile").mkdir()
    lines = [{"global_step": float(step), "time/update": float(step), "rollout/length": 20.0} for step in range(4)]
    said = write_phases(config, tmp_path, lines)
    table = (tmp_path / "profile/phases.md").read_text()
    [row] = [line for line in table.splitlines() if line.startswith("| update")]
    measured, predicted = (cell.strip() for cell in row.split("|")[2:4])
    assert measured == "1.5"  # of steps 1 and 2
    assert float(predicted) == pytest.approx(predict_phases(config, "cpu", mean_tokens=20)["update"], rel=0.01)
    assert str(tmp_path / "profile") in said
    assert "had no such step" in write_phases(load_config(CONFIG, ["profile.steps=7"]), tmp_path, lines)


def test_sampling_is_predicted_for_gpus_alone() -> None:
    config = load_config(CONFIG, [])
    assert "sample" in predict_phases(config, "h100", mean_tokens=20)
    assert set(predict_phases(config, "cpu", mean_tokens=20)) == {"score", "update", "sync"}
