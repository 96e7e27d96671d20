"""PNPO: the geometric mean of the prefix's ratios as weight, dropped outside a band that narrows along the sequence (arXiv:2608.01418)."""

from __future__ import annotations

from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.options import log_bounds
from megatron_minpro.objectives.policy_gradient import weighted_policy_gradient
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, log_ratio, scan_batch
from megatron_minpro.objectives.token_bounds import around_one


def pnpo(
    batch: TokenBatch,
    *,
    clip_low: float = 7e-4,
    clip_high: float = 9.5e-4,
    aggregation: str = "seq_mean_token_mean",
    aggregation_length: int | None = None,
) -> ObjectiveOutput:
    """J = 1/S sum_s 1/T sum_t keep_t sg(w_t) A_t log pi_theta(t), w_t = exp(1/t sum_{i<=t} log rho_i), keep_t: 1 - clip_low sqrt(T / t) <=
    w_t <= 1 + clip_high sqrt(T / t) (arXiv:2608.01418v1, eqs. 7 to 11).

    t counts the trained tokens of a sequence, T are all of them. The band does not look at the sign of A; a later token may be kept again;
    dropped tokens stay in the denominator.
    Defaults: the paper's. They fit answers of about 10,000 tokens with hardly any mismatch: for independent log ratios of standard
    deviation s the test is |z| <= clip sqrt(T) / s at every t, so shorter answers are mostly dropped, and so are all late tokens under a
    steady drift of 1e-3. Under staleness the widths need a search; the paper reuses mini-batches only.

    Args:
        batch: one packed micro-batch.
        clip_low: the lower edge at the last token is 1 - clip_low; an edge of 0 or less never acts.
        clip_high: the upper edge at the last token is 1 + clip_high.
        aggregation: what the sum over tokens is divided by; see aggregation.py.
        aggregation_length: the constant of aggregation `constant`, else None.

    Raises:
        ValueError: an option is out of range.
    """
    log_bounds(clip_low, clip_high)
    log_ratio_T = log_ratio(batch)
    scanned = scan_batch(batch, log_ratio_T, aggregation=aggregation, aggregation_length=aggregation_length)
    count_T = scanned.place_T.clamp(min=1.0)
    log_weights_T = scanned.cumulative_T / count_T
    widening_T = (batch.shard.per_token(scanned.num_trained_S) / count_T).double().sqrt()
    log_low_T, log_high_T = around_one(clip_low * widening_T, clip_high * widening_T)
    keep_T = (log_low_T <= log_weights_T) & (log_weights_T <= log_high_T)
    low, high = -MAX_LOG_RATIO, MAX_LOG_RATIO
    return weighted_policy_gradient(batch, log_ratio_T, scanned, log_weights_T, log_low=low, log_high=high, keep_T=keep_T)
