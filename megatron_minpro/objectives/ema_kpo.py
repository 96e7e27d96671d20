"""EMA-KPO: an exponential moving average of the log ratios along the sequence, clipped as PPO does (arXiv:2602.10609)."""

from __future__ import annotations

import math

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number, log_bounds
from megatron_minpro.objectives.policy_gradient import ppo_clip
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, log_ratio, scan_batch
from parallel.prefix_scan import PrefixDecayedSum


def ema_kpo(
    batch: TokenBatch,
    *,
    noise_ratio: float = 1e-6,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
    max_log_ratio: float = 10.0,
    aggregation: str = "seq_mean_token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = mean_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), log r_t = sg(x_t) + log pi_theta(t) - sg(log pi_theta(t)), where
    x_t = x_{t-1} + K (log rho_t - x_{t-1}), x_0 = 0, K = (sqrt(q^2 + 4 q) - q) / 2 (arXiv:2602.10609).

    KPO filters the log ratios of a sequence as a Kalman filter does; K is the gain that its filter settles at, q = noise_ratio = Q / R.
    Only the token's own log-prob carries a gradient. t runs over trained tokens. x_t is held at most at max_log_ratio (a value, not a gate)
    and each log ratio within +-20.
    Defaults: those of KPO's released code for the filter itself, Q 1e-6, R 1, clip 3e-4 and 4e-4: K is then 1e-3, so early tokens have
    ratio 1 whatever happens. q -> infinity gives K = 1, which is PPO.
    Unclear: the released code has the filter with a gain that depends on t; the constant gain is known from a note on the paper, and so
    is an unclipped setting with Q 1e-4 (clip_low 1 and a large clip_high).

    Args:
        batch: one packed micro-batch.
        noise_ratio: q.
        clip_low: the ratio's lower bound is 1 - clip_low; 1 or more: no lower bound.
        clip_high: its upper bound is 1 + clip_high.
        max_log_ratio: x is held at this value.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    log_low, log_high = log_bounds(clip_low, clip_high)
    check_number("noise_ratio", noise_ratio, above=0)
    if check_number("max_log_ratio", max_log_ratio, above=0) > MAX_LOG_RATIO:
        raise ValueError(f"max_log_ratio must be at most {MAX_LOG_RATIO}, got {max_log_ratio!r}")
    gain = 2 / (1 + math.sqrt(1 + 4 / noise_ratio))  # the formula, without the difference of two numbers close to each other
    log_ratio_T = log_ratio(batch)
    held_T = log_ratio_T.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    average = PrefixDecayedSum(gain * held_T, batch.loss_mask_T, decay=1 - gain)
    scanned = scan_batch(batch, log_ratio_T, average, aggregation=aggregation, aggregation_length=aggregation_length)
    average_T = scanned.results[0].clamp(max=max_log_ratio) + (log_ratio_T - log_ratio_T.detach())
    return ppo_clip(batch, log_ratio_T, scanned, average_T, log_low=log_low, log_high=log_high)
