"""Seconds from bytes."""

from __future__ import annotations

import pytest

from rollout.weights.time_limits import BucketLimits, WeightTimeLimits

GIGABYTE = 10**9


def test_a_step_has_a_floor_and_the_time_of_its_bytes() -> None:
    limits = WeightTimeLimits(step_s=60, bytes_per_s=0.1 * GIGABYTE)
    assert limits.moving(0) == 60
    assert limits.moving(512 * 2**20) == pytest.approx(60 + 5.37, abs=0.01)
    assert limits.moving(61 * GIGABYTE) == pytest.approx(670)


def test_buckets_together_have_the_time_of_all_their_bytes() -> None:
    buckets = BucketLimits(WeightTimeLimits(step_s=60, bytes_per_s=GIGABYTE))
    assert buckets.next_s(10 * GIGABYTE) == 70
    buckets.spend(1)
    assert buckets.next_s(10 * GIGABYTE) == 70, "one that hangs after quick ones does not get their time as well"
    buckets.spend(69)
    assert buckets.next_s(10 * GIGABYTE) == 60 + 30 - 70
    buckets.spend(20)
    assert buckets.next_s(0) == 0
