from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro.tracking.metrics_file import MetricsFile, read_metrics


def steps_of(run_dir: Path) -> list[float | None]:
    return [line["global_step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def test_each_step_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "run") as file:
        file.log(0, {"reward/trained": 0.25, "batch/lag_min": 3, "loss/total": None})
        written = (tmp_path / "run/metrics.jsonl").read_text()
        assert written == '{"global_step": 0, "reward/trained": 0.25, "batch/lag_min": 3, "loss/total": null}\n'
        file.log(1, {"reward/trained": 0.5})
        assert list(read_metrics(tmp_path / "run/metrics.jsonl"))[1] == {"global_step": 1, "reward/trained": 0.5}


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as file, pytest.raises(ValueError, match="JSON compliant"):
        file.log(0, {"loss/total": float("nan")})
    assert steps_of(tmp_path) == []


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as file:
        file.log(3, {})
        with pytest.raises(ValueError, match="step 3 follows step 3"):
            file.log(3, {})
    with MetricsFile(tmp_path) as file, pytest.raises(ValueError, match="step 2 follows step 3"):
        file.log(2, {})


def test_a_resumed_run_writes_the_steps_after_its_checkpoint_anew(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as file:
        for step in range(4):
            file.log(step, {"reward/trained": float(step)})
    with MetricsFile(tmp_path) as file:
        file.truncate_after(1)
        file.log(2, {"reward/trained": 20.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["global_step"], line["reward/trained"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_truncation_can_forget_everything(tmp_path: Path) -> None:
    with MetricsFile(tmp_path) as file:
        file.log(5, {})
        file.truncate_after(-1)
        file.log(0, {})
    assert steps_of(tmp_path) == [0]


def test_a_line_cut_short_by_a_crash_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 0}\n{"global_step": 1, "rew')
    assert steps_of(tmp_path) == [0]
    with MetricsFile(tmp_path) as file:
        file.log(1, {})
    assert steps_of(tmp_path) == [0, 1]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"reward/trained": 1}', '{"global_step": "0"}'])
def test_a_foreign_metrics_file_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected"):
        MetricsFile(tmp_path)
