"""The ways in which the objectives use a ratio: as a fixed weight on log pi, bounded or as it is, or as PPO's clipped surrogate.

Shapes: T local packed tokens.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from megatron_minpro.objectives import score_centering
from megatron_minpro.objectives.aggregation import aggregate
from megatron_minpro.objectives.base import ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.cut import Cut, has_no_gradient
from megatron_minpro.objectives.metrics import centering_metrics, token_metrics
from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, Scanned, advantages, ratio, trained
from megatron_minpro.objectives.score_centering import Centering, LogMass


def weighted_policy_gradient(
    batch: TokenBatch,
    log_ratio_T: Float[Tensor, " T"],
    scanned: Scanned,
    log_weights_T: Float[Tensor, " T"],
    *,
    log_low: float | Float[Tensor, " T"],
    log_high: float | Float[Tensor, " T"],
    scale: float = 1.0,
    keep_T: Bool[Tensor, " T"] | None = None,
    log_factor_T: Float[Tensor, " T"] | None = None,
) -> ObjectiveOutput:
    """loss = sum_t -sg(w_t) A_t log pi(t) / divisor_t with w = scale * exp(clamp(log_weights, log_low, log_high)).

    The whole weight is detached, so the gradient is exactly -w A / divisor. It is bounded in log space, before exp.

    Args:
        batch: one packed micro-batch.
        log_ratio_T: log pi_theta - log pi_old, for the metrics.
        scanned: the answers of `scan_batch`.
        log_weights_T: log of the weights before they are bounded.
        log_low, log_high: the bounds, in log space: numbers or [T].
        scale: multiplies the bounded weights.
        keep_T: tokens where it is False have weight 0 (counted as hard-clipped); their share of the divisor remains.
        log_factor_T: given where scores can be centred: log_weights_T is log_factor_T + log_ratio_T, or bounded to one number, and
            log_factor_T is known before the token is drawn.
    """
    log_weights_T = log_weights_T.detach()
    log_low_T, log_high_T = _as_tensor(log_low, log_weights_T), _as_tensor(log_high, log_weights_T)
    bounded_T = torch.minimum(torch.maximum(log_weights_T, log_low_T), log_high_T)
    dropped_T = torch.zeros_like(batch.loss_mask_T) if keep_T is None else ~keep_T
    weights_T = trained(batch, torch.where(dropped_T, 0.0, scale * bounded_T.exp()))
    log_mass = None if log_factor_T is None else score_centering.clipped(log_factor_T, log_low_T, log_high_T)
    cut_T = _held(log_weights_T, log_low_T, log_high_T).masked_fill(dropped_T, Cut.FILTERED)
    return _fixed(batch, log_ratio_T, scanned, weights_T, cut_T, log_mass=log_mass, scale=scale)


def masked_policy_gradient(
    batch: TokenBatch, log_ratio_T: Float[Tensor, " T"], scanned: Scanned, *, log_low: float, log_high: float
) -> ObjectiveOutput:
    """loss = sum_t -sg(w_t) A_t log pi(t) / divisor_t with w = rho where low <= rho <= high, else 0 (counted as hard-clipped).

    Args:
        batch: one packed micro-batch.
        log_ratio_T: log rho = log pi_theta - log pi_old.
        scanned: the answers of `scan_batch`.
        log_low, log_high: the bounds, in log space.
    """
    d_T = log_ratio_T.detach()
    cut_T = _uncut(batch).masked_fill(d_T < log_low, Cut.BELOW).masked_fill(d_T > log_high, Cut.ABOVE)
    weights_T = trained(batch, torch.where(has_no_gradient(cut_T), 0.0, ratio(d_T)))
    log_mass = score_centering.masked(log_low=log_low, log_high=log_high)
    return _fixed(batch, log_ratio_T, scanned, weights_T, cut_T, log_mass=log_mass)


def fixed_weights(batch: TokenBatch, log_ratio_T: Float[Tensor, " T"], scanned: Scanned, weights_T: Float[Tensor, " T"]) -> ObjectiveOutput:
    """loss = sum_t -sg(w_t) A_t log pi(t) / divisor_t with finite weights as they are, which may be negative. Nothing counts as clipped.

    Args:
        batch: one packed micro-batch.
        log_ratio_T: log pi_theta - log pi_old, for the metrics.
        scanned: the answers of `scan_batch`.
        weights_T: w.
    """
    return _fixed(batch, log_ratio_T, scanned, trained(batch, weights_T.detach()), _uncut(batch))


def _fixed(
    batch: TokenBatch,
    log_ratio_T: Tensor,
    scanned: Scanned,
    weights_T: Tensor,
    cut_T: Tensor,
    *,
    log_mass: LogMass | None = None,
    scale: float = 1.0,
) -> ObjectiveOutput:
    """log_mass, scale: what score centering must know of the weight; None: it cannot be centred."""
    loss_T = -(weights_T * advantages(batch)) * trained(batch, batch.logprobs_T)
    centering = None
    if batch.top is not None and log_mass is not None:
        centering = score_centering.center(batch.loss_mask_T, batch.top, log_mass, scale=scale)
        loss_T = loss_T + advantages(batch) * centering.term_T
    return _output(batch, log_ratio_T, scanned, loss_T, weights_T, cut_T, centering=centering)


def ppo_clip(
    batch: TokenBatch,
    log_ratio_T: Float[Tensor, " T"],
    scanned: Scanned,
    differentiable_log_ratio_T: Float[Tensor, " T"],
    *,
    log_low: float | Float[Tensor, " T"],
    log_high: float | Float[Tensor, " T"],
    dual_clip: float | None = None,
    keep_T: Bool[Tensor, " T"] | None = None,
) -> ObjectiveOutput:
    """loss = sum_t max(-A r, -A clip(r, low, high)) / divisor (PPO, arXiv:1707.06347, eq. 7), r = exp(differentiable_log_ratio_T).

    The gradient is 0 where A > 0 and r > high, A < 0 and r < low, and A < 0 and r > c; elsewhere -r A / divisor. r is held within
    exp(+-20) and without gradient outside.

    Args:
        batch: one packed micro-batch.
        log_ratio_T: the token's own log ratio, for the metrics.
        scanned: the answers of `scan_batch`.
        differentiable_log_ratio_T: log of the ratio r that is clipped, with gradient.
        log_low, log_high: the bounds, in log space: numbers or [T].
        dual_clip: c: for A < 0 the loss is also at most -A c (arXiv:1912.09729, eq. 5); None: off.
        keep_T: tokens where it is False have loss and gradient 0 (counted as hard-clipped); their share of the divisor remains.
    """
    d_T, advantages_T = differentiable_log_ratio_T, advantages(batch)
    ratio_T = ratio(d_T)
    bounded_T = torch.minimum(torch.maximum(d_T, _as_tensor(log_low, d_T)), _as_tensor(log_high, d_T)).detach()
    ceiling = math.inf if dual_clip is None else math.log(dual_clip)
    above_T = ((advantages_T > 0) & (d_T > log_high)) | ((advantages_T < 0) & (d_T > ceiling))
    below_T = (advantages_T < 0) & (d_T < log_low)
    gated_T = above_T | below_T
    limit_T = torch.where((advantages_T < 0) & (d_T > ceiling), ceiling, bounded_T)
    loss_T = -advantages_T * torch.where(gated_T, ratio(limit_T), ratio_T)
    overflow_T = (d_T.abs() > MAX_LOG_RATIO) & (advantages_T != 0)
    cut_T = _uncut(batch).masked_fill(overflow_T, Cut.OVERFLOW).masked_fill(above_T, Cut.ABOVE).masked_fill(below_T, Cut.BELOW)
    if keep_T is not None:
        loss_T, cut_T = torch.where(keep_T, loss_T, 0.0), cut_T.masked_fill(~keep_T, Cut.FILTERED)
    weights_T = trained(batch, torch.where(has_no_gradient(cut_T), 0.0, ratio_T.detach()))
    return _output(batch, log_ratio_T, scanned, loss_T, weights_T, cut_T)


def _output(
    batch: TokenBatch,
    log_ratio_T: Tensor,
    scanned: Scanned,
    loss_T: Tensor,
    weights_T: Tensor,
    cut_T: Tensor,
    *,
    centering: Centering | None = None,
) -> ObjectiveOutput:
    if batch.top is not None and centering is None:
        raise ValueError("the batch has top tokens, but this objective's weight cannot be centred")
    if batch.correction_weights_T is not None:
        correction_T = trained(batch, batch.correction_weights_T.detach())
        loss_T, weights_T = loss_T * correction_T, weights_T * correction_T
    loss = aggregate(batch, loss_T, scanned.divisors_T)
    metrics = token_metrics(
        batch,
        log_ratio_T=log_ratio_T.detach(),
        scanned=scanned,
        weights_T=weights_T,
        cut_T=cut_T,
        loss=loss.detach(),
    )
    if centering is not None:
        metrics |= centering_metrics(batch, centering)
    return ObjectiveOutput(
        loss=loss,
        weights_T=weights_T,
        prefix_min_T=scanned.prefix_min_T.detach(),
        cumulative_T=scanned.cumulative_T.detach(),
        cut_T=cut_T.masked_fill(~batch.loss_mask_T, Cut.NONE),
        metrics=metrics,
    )


def _uncut(batch: TokenBatch) -> UInt8[Tensor, " T"]:
    return torch.zeros_like(batch.loss_mask_T, dtype=torch.uint8)


def _held(log_weights_T: Tensor, log_low_T: Tensor, log_high_T: Tensor) -> UInt8[Tensor, " T"]:
    none_T = torch.zeros_like(log_weights_T, dtype=torch.uint8)
    return none_T.masked_fill(log_weights_T < log_low_T, Cut.HELD_LOW).masked_fill(log_weights_T > log_high_T, Cut.HELD_HIGH)


def _as_tensor(bound: float | Tensor, like: Tensor) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.full_like(like, bound, requires_grad=False)
