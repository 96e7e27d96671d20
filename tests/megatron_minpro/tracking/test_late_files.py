"""What a full disk and a file system that does not answer do to the small files of a run: they come late, and a run goes on."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config import TrackerConfig
from megatron_minpro.tracking.json_lines import JsonLines
from megatron_minpro.tracking.late_files import LateFiles
from megatron_minpro.tracking.metrics_file import MetricsFile, read_metrics
from megatron_minpro.tracking.rollout_log import RolloutLog, RolloutRecord
from megatron_minpro.tracking.tracker import RunTracker, make_tracker

RECORD = RolloutRecord(
    sample_id="step3-7",
    group=0,
    prompt_id="p",
    prompt="2 + 2",
    response="4" * 8000,
    answer="4",
    extracted="4",
    error=None,
    reward=1.0,
    advantage=0.5,
    policy_version=0,
    finish_reason="stop",
    num_response_tokens=8000,
    dropped=None,
)


def fill(disk: Path) -> Path:
    """Nothing more can be written; a file that may go."""
    filler = disk / "of_somebody_else"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(512))
    return filler


def test_a_full_disk_delays_files_in_their_order(small_disk: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    disk = small_disk(64 << 10)
    files, lines = LateFiles(disk), JsonLines(disk / "lines.jsonl")
    filler = fill(disk)
    large = {"text": "x" * 5000}
    for number in range(3):
        files.write(f"line {number}", partial(lines.append, {"number": number, **large}))
    for count in (1, 2):
        files.write("count", partial(write_atomically, disk / "count", f"{count}" * 5000))
    files.write("progress.json", partial(write_atomically, disk / "progress.json", "x" * 5000), may_be_lost=True)
    with pytest.raises(OSError, match=r"No space left on device: '.*/lines.jsonl'"):
        files.flush()
    assert (disk / "lines.jsonl").read_bytes() == b"" and not (disk / "count").exists()
    filler.unlink()
    files.flush()
    assert [json.loads(line)["number"] for line in (disk / "lines.jsonl").read_text().splitlines()] == [0, 1, 2]
    assert (disk / "count").read_text() == "2" * 5000 and not (disk / "progress.json").exists()
    assert [record.message for record in caplog.records] == [
        f"{disk}: line 0 cannot be written: No space left on device; 0 bytes are free on {disk}; it waits in memory, training goes on",
        f"{disk}: can be written again, and what waited is; lost: progress.json",
    ]


def test_a_file_system_that_does_not_answer_holds_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = LateFiles(tmp_path, patience_s=0.2)
    os.mkfifo(tmp_path / "silent")
    files.write("a", lambda: (tmp_path / "a").write_bytes((tmp_path / "silent").read_bytes()) and None)
    began = time.monotonic()
    for number in range(100):
        files.write(f"b{number}", (tmp_path / f"b{number}").touch)
        files.write("progress.json", (tmp_path / "progress.json").touch, may_be_lost=True)
    assert time.monotonic() - began < 20  # patience was lost once, not a hundred times
    with pytest.raises(TimeoutError, match="its file system does not answer, a, b0, "):
        files.flush(timeout_s=0.1)
    (tmp_path / "silent").write_bytes(b"go on")
    files.flush()
    assert (tmp_path / "a").read_bytes() == b"go on" and len(list(tmp_path.glob("b*"))) == 100
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "does not answer" in caplog.text


def test_a_mistake_of_ours_is_raised_where_it_was_made(tmp_path: Path) -> None:
    files, metrics = LateFiles(tmp_path), MetricsFile(tmp_path)
    files.write("metrics", lambda: metrics.log(3, {}))
    with pytest.raises(ValueError, match="step 3 follows step 3"):
        files.write("metrics", lambda: metrics.log(3, {}))
    files.flush()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_metrics_come_late_and_tensorboard_says_what_it_lacks(small_disk: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    disk = small_disk(256 << 10)
    files = LateFiles(disk)
    metrics = MetricsFile(disk)
    tracker = RunTracker(metrics, [make_tracker(TrackerConfig(name="tensorboard"), disk)], files)
    numbers = {f"time/{name}": 0.25 for name in ("sample", "score", "update", "sync")}
    tracker.log(0, numbers)
    filler = fill(disk)
    for step in range(1, 60):  # until what the disk's last blocks hold is used up
        tracker.log(step, numbers)
    with pytest.raises(OSError, match="No space left"):
        files.flush()
    filler.unlink()
    tracker.log(60, numbers)
    files.flush()
    assert [line["global_step"] for line in read_metrics(disk / "metrics.jsonl")] == list(range(61))
    assert caplog.text.count("TensorBoard lacks global step") == 1
    tracker.finish({})


def test_responses_that_a_full_disk_cannot_take_are_left_out(small_disk: Callable[[int], Path], caplog: pytest.LogCaptureFixture) -> None:
    disk = small_disk(64 << 10)
    log = RolloutLog(disk)
    log.write(0, [RECORD])
    filler = fill(disk)
    log.write(1, [RECORD])
    filler.unlink()
    log.write(2, [RECORD])
    assert sorted(path.name for path in (disk / "rollouts").iterdir()) == ["step_000000.jsonl", "step_000002.jsonl"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "step_000001.jsonl cannot be written: No space left on device" in caplog.text
    assert caplog.text.rstrip().endswith("can be written again, and what waited is; lost: step_000001.jsonl")
