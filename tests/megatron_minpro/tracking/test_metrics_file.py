from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_minpro.tracking.metrics_file import (
    MetricsWriter,
    Progress,
    RolloutLog,
    RolloutRecord,
    read_metrics,
    read_progress,
    write_progress,
)


def steps_of(run_dir: Path) -> list[float | None]:
    return [line["global_step"] for line in read_metrics(run_dir / "metrics.jsonl")]


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_each_step_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"reward": 0.25, "lag_min": 3})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"global_step": 0, "reward": 0.25, "lag_min": 3}\n'
        writer.write(1, {"reward": 0.5})
        assert list(read_metrics(tmp_path / "metrics.jsonl"))[1] == {"global_step": 1, "reward": 0.5}


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(0, {"reward": 0.25, "entropy": math.nan})
        writer.write(1, {"reward": 0.5})
    assert scalars(tmp_path, "reward") == [(0, 0.25), (1, 0.5)]


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"entropy": math.nan, "loss": math.inf})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"global_step": 0, "entropy": None, "loss": None}


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, {})
        with pytest.raises(ValueError, match="step 3 follows step 3"):
            writer.write(3, {})
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match="step 2 follows step 3"):
        writer.write(2, {})


def test_a_resumed_run_writes_the_steps_after_its_checkpoint_anew(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for step in range(4):
            writer.write(step, {"reward": float(step)})
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.truncate_after(1)
        writer.write(2, {"reward": 20.0})
    assert [(line["global_step"], line["reward"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [(0, 0.0), (1, 1.0), (2, 20.0)]
    assert scalars(tmp_path, "reward") == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_truncation_can_forget_everything(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(5, {})
        writer.truncate_after(-1)
        writer.write(0, {})
    assert steps_of(tmp_path) == [0]


def test_a_line_cut_short_by_a_crash_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"global_step": 0}\n{"global_step": 1, "rew')
    assert steps_of(tmp_path) == [0]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {})
    assert steps_of(tmp_path) == [0, 1]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"reward": 1}', '{"global_step": "0"}'])
def test_a_foreign_metrics_file_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected"):
        MetricsWriter(tmp_path, tensorboard=False)


RECORD = RolloutRecord(
    prompt_id="p-1",
    prompt="3 + 4 :",
    response="3 + 4 = 7 ; ½",
    answer="7",
    extracted="7",
    error=None,
    reward=1.0,
    advantage=0.5,
    policy_version=16,
    finish_reason="stop",
    num_response_tokens=7,
    dropped=None,
)


def test_rollouts_are_kept_as_readable_lines_step_by_step(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    path = log.write(12, [RECORD, RECORD])
    assert path == tmp_path / "rollouts/step_000012.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    assert "3 + 4 = 7 ; ½" in lines[0]
    assert RolloutRecord(**json.loads(lines[1])) == RECORD


def test_rollouts_after_the_checkpoint_are_deleted_on_resume(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    for step in (9, 10, 11):
        log.write(step, [RECORD])
    log.truncate_after(9)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000009.jsonl"]


def test_the_latest_heartbeat_is_what_is_read(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    write_progress(tmp_path, Progress(phase="sample", global_step=0))
    write_progress(tmp_path, Progress(phase="update", global_step=3, detail="mini-batch 2 of 16"))
    progress = read_progress(tmp_path)
    assert progress is not None
    assert (progress.phase, progress.global_step, progress.detail) == ("update", 3, "mini-batch 2 of 16")
    assert progress.updated_at > 1.7e9
