"""How far the server's log-probs of the sampled tokens may lie from the trainer's, under the same weights.

Rounding explains a small difference. A large mean difference means that the server does not hold the weights it should, or computes
another model: pi_old is then not the policy that sampled. Mean |difference| per token, measured or from the arithmetic:

    float32 on both sides     3e-7 measured (configs/tiny_moe_cpu.yaml); the limit is 1e-4
    bfloat16 on either side   8 bits of mantissa: a logit of 10 is rounded by up to 0.03; the limit is 0.05

A server that is one update behind lies above the first limit: the smallest useful update moves log-probs by 1e-3 and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from megatron_minpro.config import RunConfig

FLOAT32_LIMIT = 1e-4
BFLOAT16_LIMIT = 0.05


class LogprobGapTooLarge(RuntimeError):
    """Server and trainer do not score the same tokens alike."""


def limit(config: RunConfig) -> float:
    """The largest mean difference that is accepted: rollout.max_logprob_gap, or the default for the two dtypes."""
    if config.rollout.max_logprob_gap is not None:
        return config.rollout.max_logprob_gap
    return FLOAT32_LIMIT if config.model.dtype == config.rollout.dtype == "float32" else BFLOAT16_LIMIT


def gap_warning(metrics: Mapping[str, float | None], config: RunConfig) -> str | None:
    """What to say of a global step whose mean gap is above the limit; None when all is well, or when the step sampled nothing.

    Args:
        metrics: of one global step. A mean that is not finite is NaN, or None as in metrics.jsonl.
        config: of the run.
    """
    if "engine_logprob_gap/mean" not in metrics:
        return None
    found, allowed = metrics["engine_logprob_gap/mean"], limit(config)
    if found is not None and found <= allowed:
        return None
    return (
        f"server and trainer log-probs of the sampled tokens differ by {math.nan if found is None else found:.3g} on average, "
        f"rollout.max_logprob_gap allows {allowed:g}: rounding does not explain it. Check that the servers hold the actor's weights "
        "(debug.check_weights=true) and that no option makes the trainer another model than the one that is served"
    )


def check_gap(metrics: Mapping[str, float], config: RunConfig) -> None:
    """Raise LogprobGapTooLarge for a mean gap above the limit, unless rollout.logprob_gap_action is warn."""
    warning = gap_warning(metrics, config)
    if warning is not None and config.rollout.logprob_gap_action == "stop":
        raise LogprobGapTooLarge(warning)


def check_every_token(gap: torch.Tensor, config: RunConfig) -> None:
    """With debug.check_weights and float32 on both sides: 99 of 100 tokens must agree to the limit.

    Not all: where two experts' gates tie, rounding decides which one a token visits, and that token's log-prob jumps.

    Args:
        gap: |server - trainer| log-prob of every sampled token.
        config: of the run.

    Raises:
        LogprobGapTooLarge: they do not.
    """
    if not config.debug.check_weights or not config.model.dtype == config.rollout.dtype == "float32":
        return
    found = float(gap.kthvalue(math.ceil(0.99 * len(gap))).values) if gap.isfinite().all() else math.nan
    if not found <= FLOAT32_LIMIT:
        raise LogprobGapTooLarge(
            f"debug.check_weights: server and trainer log-probs differ by {found:.3g} (99 of 100 tokens), allowed {FLOAT32_LIMIT:g}"
        )
