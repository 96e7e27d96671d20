"""Seconds add up over attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_minpro.run import attempt_clock
from megatron_minpro.run.attempt_clock import AttemptClock


class Time:
    """A clock that goes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(attempt_clock, "time", time)
    return time


def test_phases_of_all_attempts_add_up(clock_time: Time, tmp_path: Path) -> None:
    for _ in range(2):
        clock = AttemptClock(tmp_path)
        with clock.written(), clock.phase("total"):
            with clock.phase("base_model"):
                clock_time.now += 3
            clock_time.now += 4
        clock_time.now += 1000  # nobody runs
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"base_model": 6.0, "total": 14.0}
    assert AttemptClock(tmp_path).seconds() == {"base_model": 6.0, "total": 14.0}


def test_a_phase_that_goes_on_or_fails_counts_until_now(clock_time: Time, tmp_path: Path) -> None:
    clock = AttemptClock(tmp_path)
    with pytest.raises(RuntimeError), clock.phase("total"):
        clock_time.now += 2
        assert clock.seconds() == {"total": 2.0}
        raise RuntimeError
    clock_time.now += 5
    assert clock.seconds() == {"total": 2.0}


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    for content in ("[1]", "{", '{"total": "long"}', '{"total": null}'):
        (tmp_path / "seconds.json").write_text(content)
        with pytest.raises(ValueError, match=r"seconds\.json: expected one JSON object with seconds by phase"):
            AttemptClock(tmp_path)
