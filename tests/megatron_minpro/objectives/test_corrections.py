"""Corrections for server against trainer: weights by hand, their way through a batch, and that off changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.config import CorrectionsConfig
from megatron_minpro.objectives.corrections import correct, correction

MakeBatch = Callable[..., RolloutBatch]
MakeSample = Callable[..., Sample]
RATIOS = [0.25, 0.5, 1.0, 2.0, 8.0]  # product 2, geometric mean 2 ** 0.2 = 1.1487
TRUNCATED: dict[str, Any] = {"truncated_is": {"max_weight": 2.0}}
MASKED: dict[str, Any] = {"masked_is": {"low": 0.5, "high": 5.0}}
KEPT: dict[str, Any] = {"rejection": {"level": "geometric_mean", "low": 0.8, "high": 1.2}}
REJECTED: dict[str, Any] = {"rejection": {"level": "product", "low": 0.8, "high": 1.2}}


@pytest.mark.parametrize(
    ("corrections", "weights"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0, 1.0]),
        (TRUNCATED, [0.25, 0.5, 1.0, 2.0, 2.0]),
        (MASKED, [0.0, 0.5, 1.0, 2.0, 0.0]),
        (KEPT, [1.0, 1.0, 1.0, 1.0, 1.0]),
        (REJECTED, [0.0] * 5),
        (TRUNCATED | MASKED, [0.0, 0.5, 1.0, 2.0, 0.0]),  # 8 is masked, not cut to 2 and kept
        (TRUNCATED | KEPT, [0.25, 0.5, 1.0, 2.0, 2.0]),
        (MASKED | REJECTED, [0.0] * 5),  # by the product of all five; of the three kept it is 1
        ({"masked_is": {"low": 0.0, "high": 1.0}}, [0.25, 0.5, 1.0, 0.0, 0.0]),
        ({"rejection": {"level": "product", "low": 0.0, "high": 2.1}}, [1.0] * 5),
        ({"rejection": {"level": "geometric_mean", "low": 0.0, "high": 1.14}}, [0.0] * 5),
        ({"rejection": {"level": "geometric_mean", "low": 0.0, "high": 1.15}}, [1.0] * 5),
    ],
)
def test_weights_by_hand(corrections: dict[str, Any], weights: list[float]) -> None:
    # Bounds are included; a thousandth keeps the rounding of log and exp away from them.
    log_ratio_R = torch.tensor(RATIOS, dtype=torch.float64).log()
    found = correction(log_ratio_R, CorrectionsConfig.model_validate(corrections))
    assert found.weights_R.tolist() == pytest.approx(weights, rel=1e-12)


def test_a_response_below_the_bounds_is_rejected_too() -> None:
    rejection = CorrectionsConfig.model_validate({"rejection": {"level": "geometric_mean", "low": 0.999, "high": 1.001}})
    for drift, rejected in ((0.0, False), (0.0009, False), (-0.0009, False), (0.0011, True), (-0.0011, True)):
        found = correction(torch.full((100,), drift, dtype=torch.float64), rejection)
        assert (found.rejected, found.weights_R.tolist()) == (rejected, [0.0 if rejected else 1.0] * 100)


def test_huge_ratios_stay_finite() -> None:
    log_ratio_R = torch.tensor([-900.0, 0.0, 900.0], dtype=torch.float64)
    for corrections, weights in ((TRUNCATED, [0.0, 1.0, 2.0]), (MASKED, [0.0, 1.0, 0.0]), (KEPT, [1.0] * 3)):
        assert correction(log_ratio_R, CorrectionsConfig.model_validate(corrections)).weights_R.tolist() == weights


def batch_of(make_sample: MakeSample, *log_ratios: list[float]) -> RolloutBatch:
    samples = tuple(
        make_sample(n, response=len(row), engine_logprobs=(-2.0,) * len(row), behaviour_logprobs=tuple(x - 2.0 for x in row))
        for n, row in enumerate(log_ratios)
    )
    return RolloutBatch(sampled_at_step=0, policy_version=0, group_size=2, samples=samples)


def test_a_batch_keeps_its_weights_and_tells_how_many_it_changed(make_sample: MakeSample) -> None:
    log_2 = math.log(2)
    batch = batch_of(make_sample, [0.0, 2 * log_2, 4 * log_2], [0.0, 0.0], [0.0], [-3 * log_2, 0.0, 0.0, 0.0])
    corrections = TRUNCATED | MASKED | {"rejection": {"level": "product", "low": 0.01, "high": 16.5}}
    corrected, metrics = correct(batch, CorrectionsConfig.model_validate(corrections))
    # Products 64, 1, 1, 1/8: the first response is rejected.
    expected = [[0.0, 0.0, 0.0], [1.0, 1.0], [1.0], [0.0, 1.0, 1.0, 1.0]]
    assert [sample.correction_weights.tolist() for sample in corrected.samples] == expected
    assert metrics == {
        "correction/weight": pytest.approx(6 / 10),
        "correction/truncated": 2 / 10,
        "correction/masked": 2 / 10,
        "correction/rejected": 1,
    }
    for sample, before in zip(corrected.samples, batch.samples, strict=True):
        assert sample.behaviour_logprobs is before.behaviour_logprobs, "pi_old is not touched"


def test_weights_lie_on_the_positions_that_predict_response_tokens(make_sample: MakeSample) -> None:
    sequence = make_sample(4, response=3, correction_weights=(0.5, 0.0, 2.0)).training_sequence()
    assert sequence.streams["correction_weights"].tolist() == [0.0, 0.0, 0.5, 0.0, 2.0]
    assert sequence.streams["correction_weights"].dtype == torch.float32
    assert "correction_weights" not in make_sample(4, response=3).training_sequence().streams


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_log_prob_that_is_not_finite_is_named(make_batch: MakeBatch, wrong: float) -> None:
    batch = make_batch(0)
    broken = replace(batch.samples[2], engine_logprobs=torch.tensor([-0.5, wrong]))
    with pytest.raises(ValueError, match=rf"^sample-2: response token 1 has log-prob {wrong} \(server\) and -2\.5999999\d* \(trainer\)"):
        correct(replace(batch, samples=(*batch.samples[:2], broken, batch.samples[3])), CorrectionsConfig.model_validate(TRUNCATED))


def test_a_batch_that_was_not_scored_is_refused(make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"^sample-0: behaviour_logprobs are missing; corrections compare"):
        correct(make_batch(0, behaviour_logprobs=None), CorrectionsConfig.model_validate(TRUNCATED))


def test_weights_of_some_samples_only_are_refused(make_batch: MakeBatch) -> None:
    batch = make_batch(0)
    with pytest.raises(ValueError, match=r"^sample-1: correction_weights must be there for all samples of a batch or for none$"):
        replace(batch, samples=(batch.samples[0], replace(batch.samples[1], correction_weights=torch.ones(2)), *batch.samples[2:]))
