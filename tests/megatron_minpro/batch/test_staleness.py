"""The buffer hands every batch out exactly n steps after it was sampled, and the promised lag is the one that updates produce."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.batch.staleness import LagRange, StalenessBuffer, expected_lag

MakeBatch = Callable[..., RolloutBatch]


def test_the_lag_of_two_steps_of_staleness_by_hand() -> None:
    # 16 updates a step. Batches 0, 1 and 2 are sampled before the first update: the first is trained at lag 0..15, and so on.
    lags = [expected_lag(index, staleness=2, updates_per_step=16) for index in range(5)]
    assert lags == [LagRange(0, 15), LagRange(16, 31), LagRange(32, 47), LagRange(32, 47), LagRange(32, 47)]


def test_on_policy_training_has_the_lag_of_its_own_mini_batches_alone() -> None:
    assert {expected_lag(index, staleness=0, updates_per_step=4) for index in range(6)} == {LagRange(0, 3)}


@settings(max_examples=100, deadline=None)
@given(staleness=st.integers(0, 6), num_steps=st.integers(1, 12), updates=st.integers(1, 5))
def test_every_batch_is_trained_once_n_steps_later_at_the_promised_lag(staleness: int, num_steps: int, updates: int) -> None:
    buffer = StalenessBuffer(staleness)
    policy_version = 0
    trained: list[int] = []
    for step in range(num_steps + staleness):  # the last n steps only drain
        if step < num_steps:
            buffer.push(step, SimpleNamespace(sampled_at_step=step, policy_version=policy_version))  # type: ignore[arg-type]
        due = buffer.pop(step)
        assert len(buffer) <= staleness
        if due is None:
            assert step < staleness
            continue
        assert due.sampled_at_step == step - staleness
        lags = []
        for _ in range(updates):
            lags.append(policy_version - due.policy_version)
            policy_version += 1
        assert expected_lag(len(trained), staleness=staleness, updates_per_step=updates) == LagRange(min(lags), max(lags))
        trained.append(due.sampled_at_step)
    assert trained == list(range(num_steps))
    assert len(buffer) == 0


def test_a_skipped_or_repeated_step_is_refused(make_batch: MakeBatch) -> None:
    buffer = StalenessBuffer(3)
    buffer.push(0, make_batch(0))
    with pytest.raises(ValueError, match=r"^batch of step 2 pushed after step 0$"):
        buffer.push(2, make_batch(2))
    with pytest.raises(ValueError, match=r"^batch of step 0 pushed after step 0$"):
        buffer.push(0, make_batch(0))
    with pytest.raises(ValueError, match=r"^batch of step 0 pushed at step 1$"):
        buffer.push(1, make_batch(0))


def test_a_lost_or_overdue_batch_is_refused(make_batch: MakeBatch) -> None:
    buffer = StalenessBuffer(1)
    with pytest.raises(ValueError, match=r"^step 1 trains the batch of step 0, but the oldest batch waiting is of step None$"):
        buffer.pop(1)
    buffer.push(0, make_batch(0))
    buffer.push(1, make_batch(1))
    with pytest.raises(ValueError, match=r"^step 2 trains the batch of step 1, but the oldest batch waiting is of step 0$"):
        buffer.pop(2)


def test_waiting_batches_are_restored_in_order(make_batch: MakeBatch) -> None:
    buffer = StalenessBuffer(2)
    for step in (4, 5):
        buffer.push(step, make_batch(step))
    restored = StalenessBuffer(2)
    restored.restore(buffer.waiting())
    assert [batch.sampled_at_step for batch in restored.waiting()] == [4, 5]
    restored.push(6, make_batch(6))
    due = restored.pop(6)
    assert due is not None and due.sampled_at_step == 4
    with pytest.raises(ValueError, match=r"^restore into a buffer that holds 2 batches$"):
        restored.restore(buffer.waiting())


def test_negative_staleness_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^staleness: -1 must be at least 0$"):
        StalenessBuffer(-1)
