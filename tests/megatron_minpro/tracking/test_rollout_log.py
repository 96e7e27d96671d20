from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from megatron_minpro.tracking.rollout_log import RolloutLog, RolloutRecord, read_rollouts, rollout_file

RECORD = RolloutRecord(
    sample_id="step3-7",
    group=0,
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


def test_single_rollouts_are_read_where_there_are_any(tmp_path: Path) -> None:
    RolloutLog(tmp_path).write(12, [replace(RECORD, sample_id=str(number)) for number in range(5)])
    assert [found["sample_id"] for found in read_rollouts(rollout_file(tmp_path, 12), [0, 3, 6])] == ["0", "3"]
    assert read_rollouts(rollout_file(tmp_path, 13), [0]) == []


def test_rollouts_after_the_checkpoint_are_deleted_on_resume(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    for step in (9, 10, 11):
        log.write(step, [RECORD])
    log.truncate_after(9)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000009.jsonl"]
