"""--lengths FILE: a run's rollouts, or its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro.cluster.lengths_file import read_lengths


def write(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_folder_of_rollouts_and_one_of_its_files_give_every_length(tmp_path: Path) -> None:
    first = write(tmp_path / "step_000000.jsonl", {"num_response_tokens": 10}, {"num_response_tokens": 900})
    write(tmp_path / "step_000001.jsonl", {"num_response_tokens": 30})
    assert read_lengths(first, longest=100).tokens == (10, 100)  # the planned run cuts at 100
    both = read_lengths(tmp_path, longest=1000)
    assert both.tokens == (10, 30, 900) and both.source == f"3 responses of {tmp_path}"


def test_metrics_give_a_mean_and_the_lengths_are_exponential(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"rollout/length": 30.0}, {"rollout/length": 50.0}, {"time/step": 1.0})
    found = read_lengths(path, longest=200)
    assert found.mean == pytest.approx(40) and found.longest == 200 and "exponential" in found.source


def test_a_path_without_lengths_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--lengths: .*absent: expected a run's rollouts"):
        read_lengths(tmp_path / "absent", longest=9)
    with pytest.raises(ValueError, match=r"^--lengths: .*other\.jsonl: no line has num_response_tokens"):
        read_lengths(write(tmp_path / "other.jsonl", {"id": 1}), longest=9)
