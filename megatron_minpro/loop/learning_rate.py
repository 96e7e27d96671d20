"""The learning-rate schedules: of training, and of the supervised learning that makes a base model."""

from __future__ import annotations

import math

from megatron_minpro.config import ActorConfig, WarmUpConfig

_BASE_MODEL_WARM_UP = 50  # optimizer steps


def training_rate(actor: ActorConfig, policy_version: int) -> float:
    """Linear warm-up over optimizer.warm_up_steps global steps, then constant.

    Args:
        actor: holds the optimizer's settings and the optimizer steps of a global step.
        policy_version: optimizer steps already taken.
    """
    warm_up = actor.optimizer.warm_up_steps * actor.updates_per_step
    return actor.optimizer.learning_rate * min(1.0, (policy_version + 1) / warm_up if warm_up else 1.0)


def base_model_rate(warm_up: WarmUpConfig, step: int) -> float:
    """Linear over the first 50 steps, then a cosine down to a twentieth of the peak (Loshchilov & Hutter, arXiv:1608.03983).

    Args:
        warm_up: holds the peak and the number of steps.
        step: optimizer steps already taken.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / warm_up.num_steps))
    return warm_up.learning_rate * min(1.0, (step + 1) / _BASE_MODEL_WARM_UP) * (0.05 + 0.95 * cosine)
