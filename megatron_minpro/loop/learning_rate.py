"""The learning-rate schedules: of training, and of the supervised learning that makes a base model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from megatron_minpro.config import ActorConfig, SampleSizeConfig, WarmUpConfig
from megatron_minpro.objectives import Objective
from megatron_minpro.objectives.effective_sample_size import WEIGHT_SUMS_SUFFIX, effective_sample_size
from megatron_minpro.registry import PlugInError

_BASE_MODEL_WARM_UP = 50  # optimizer steps


def training_rate(actor: ActorConfig, policy_version: int) -> float:
    """Linear warm-up over optimizer.warm_up_steps global steps, then constant.

    Args:
        actor: holds the optimizer's settings and the optimizer steps of a global step.
        policy_version: optimizer steps already taken.
    """
    warm_up = actor.optimizer.warm_up_steps * actor.updates_per_step
    return actor.optimizer.learning_rate * min(1.0, (policy_version + 1) / warm_up if warm_up else 1.0)


def check_reported(sample_size: SampleSizeConfig, objective: Objective) -> None:
    """Raise PlugInError where the objective, of the user's own, does not report the sample size that the rate is to follow."""
    if _name(sample_size) + WEIGHT_SUMS_SUFFIX not in objective.metric_names:
        reason = f"objective {objective.name} reports no {_name(sample_size)}"
        raise PlugInError("actor.optimizer.sample_size.level", sample_size.level, reason)


def sample_size_factor(sample_size: SampleSizeConfig, sums: Mapping[str, Tensor]) -> float:
    """VCPO's factor on the rate of one step (arXiv:2602.17616), min(1, (ESS / B) / base) ^ exponent. It does not enter AdamW's moments.

    Args:
        sample_size: level, exponent and base.
        sums: the objective's metrics of the step's mini-batch.

    Raises:
        FloatingPointError: the largest ratio of the mini-batch is beyond e^+-16,256.
    """
    if math.isnan(size := effective_sample_size(sums[_name(sample_size) + WEIGHT_SUMS_SUFFIX])):
        raise FloatingPointError(f"{_name(sample_size)} of the mini-batch is no number: its ratios are beyond e^+-16,256")
    return min(1.0, size / sample_size.base) ** sample_size.exponent


def _name(sample_size: SampleSizeConfig) -> str:
    return f"effective_sample_size/{sample_size.level}"


def base_model_rate(warm_up: WarmUpConfig, step: int) -> float:
    """Linear over the first 50 steps, then a cosine down to a twentieth of the peak (Loshchilov & Hutter, arXiv:1608.03983).

    Args:
        warm_up: holds the peak and the number of steps.
        step: optimizer steps already taken.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / warm_up.num_steps))
    return warm_up.learning_rate * min(1.0, (step + 1) / _BASE_MODEL_WARM_UP) * (0.05 + 0.95 * cosine)
