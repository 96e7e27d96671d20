"""CTPO: the cumulative ratio of the prefix, clipped in bounds that widen with its length (arXiv:2605.07331)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import check_number
from megatron_minpro.objectives.policy_gradient import ppo_clip
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, log_ratio, scan_batch
from parallel.prefix_scan import PrefixSum


def ctpo(
    batch: TokenBatch,
    *,
    width_low: float = 0.025,
    width_high: float = 0.05,
    power: float = 0.5,
    max_log_ratio: float = 10.0,
    aggregation: str = "seq_mean_token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = mean_t min(r_t A_t, clip(r_t, exp(-width_low t^power), exp(width_high t^power)) A_t), with
    log r_t = sg(sum_{i<=t} log rho_i) + log pi_theta(t) - sg(log pi_theta(t)) (arXiv:2605.07331).

    Only the token's own log-prob carries a gradient. t counts the trained tokens of the sequence up to and with this one, so prompts and
    tool outputs do not widen the bounds.
    Defaults: the paper's bounds, square-root growth and sequence-mean; its released run uses token_mean. As there, a token's log ratio is
    held within +-20 and the cumulative one at most at max_log_ratio (a value, not a gate: the gradient remains until the clip stops it).
    Left out: the released run's extra clip for A < 0 and its sequence-level correction for the engine, which are not in the paper's
    objective.

    Args:
        batch: one packed micro-batch.
        width_low, width_high: of the bounds at the first token.
        power: how the bounds grow with the token's place.
        max_log_ratio: the cumulative log ratio is held at this value; the gradient remains until the clip stops it.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    for name, value in (("width_low", width_low), ("width_high", width_high), ("power", power)):
        check_number(name, value, at_least=0)
    check_number("max_log_ratio", max_log_ratio, above=0)
    if max_log_ratio > MAX_LOG_RATIO:
        raise ValueError(f"max_log_ratio must be at most {MAX_LOG_RATIO}, got {max_log_ratio!r}")
    log_ratio_T, mask_T = log_ratio(batch), batch.loss_mask_T
    held_T = log_ratio_T.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    scanned = scan_batch(batch, log_ratio_T, PrefixSum(held_T, mask_T), aggregation=aggregation, aggregation_length=aggregation_length)
    growth_T = scanned.place_T.pow(power)
    cumulative_T = scanned.results[0].clamp(max=max_log_ratio) + (log_ratio_T - log_ratio_T.detach())
    return ppo_clip(batch, log_ratio_T, scanned, cumulative_T, log_low=-width_low * growth_T, log_high=width_high * growth_T)
