"""The records that an objective takes and returns.

Shapes: T local packed tokens (one shard's, padding included), S sequences, K top tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from torch import Tensor

from parallel.sequence_shard import SequenceShard
from parallel.top_tokens import ScoredTopTokens

Statistics = Callable[..., Tensor]
Loss = TypeVar("Loss", bound=Callable[..., "ObjectiveOutput"])


def with_minibatch_statistics(statistics: Statistics) -> Callable[[Loss], Loss]:
    """Declare that an objective needs statistics of the whole mini-batch: decorate `objective(batch, statistics, *, options)`.

    Args:
        statistics: `statistics(batch, **options)` gives one batch's share as a float64 tensor. Shares are summed over micro-batches and
            over the data- and context-parallel ranks before the first loss of the mini-batch.
    """

    def declare(objective: Loss) -> Loss:
        objective.minibatch_statistics = statistics  # type: ignore[attr-defined]
        return objective

    return declare


def with_behaviour_entropies(objective: Loss) -> Loss:
    """Declare that an objective needs `behaviour_entropies_T`: the batch is then scored with them."""
    objective.needs_behaviour_entropies = True  # type: ignore[attr-defined]
    return objective


def with_score_centering(objective: Loss) -> Loss:
    """Declare that an objective's weight of a token is a function of its ratio alone, once the tokens before it are known, and that it
    centres scores where a batch has top tokens; see score_centering.py."""
    objective.centers_scores = True  # type: ignore[attr-defined]
    return objective


class NonFiniteTokenError(ValueError):
    """A trained token has a NaN or infinite value. One rank may see it alone: the caller must stop all ranks together."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenBatch:
    """One packed micro-batch, as far as this rank holds it.

    Values where `loss_mask_T` is False are never used, so they may be anything, also NaN. Construction checks everything that can be
    checked locally and raises ValueError: dtypes, shapes, counts, a mask on padding; and NonFiniteTokenError for a NaN or infinity at a
    trained token.
    """

    logprobs_T: Float32[Tensor, " T"]  # carries the gradient: log pi_theta(o_t)
    behaviour_logprobs_T: Float32[Tensor, " T"]  # log pi_old(o_t), pi_old = the policy that sampled o_t
    advantages_T: Float32[Tensor, " T"]
    loss_mask_T: Bool[Tensor, " T"]  # True where a response token is trained on
    shard: SequenceShard  # sequence and position of every local token; the scans
    global_tokens: int  # trained tokens of the whole mini-batch, over DP, CP and micro-batches
    global_sequences: int  # sequences of the whole mini-batch with at least one trained token
    behaviour_entropies_T: Float32[Tensor, " T"] | None = None  # of pi_old's distribution at the token, nats; None: not recorded
    lag: int | None = None  # whole global steps of training between the weights that sampled the batch and these; None: unknown
    correction_weights_T: Float32[Tensor, " T"] | None = None  # multiplies each token's loss, without gradient; None multiplies nothing
    top: ScoredTopTokens | None = None  # the sampler's most likely tokens, for score centering; None: scores are not centred

    def __post_init__(self) -> None:
        shape = (self.shard.num_local_tokens,)
        expected = {
            "logprobs_T": torch.float32,
            "behaviour_logprobs_T": torch.float32,
            "advantages_T": torch.float32,
            "loss_mask_T": torch.bool,
        }
        expected |= dict.fromkeys(self._optional_streams(), torch.float32)
        for name, dtype in expected.items():
            x = getattr(self, name)
            if x.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {x.dtype}")
            if tuple(x.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, one value per local token of the shard, got {tuple(x.shape)}")
        self._check_top()
        for name in ("global_tokens", "global_sequences"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}: a mini-batch needs a trained token")
        if self.lag is not None and (not isinstance(self.lag, int) or isinstance(self.lag, bool) or self.lag < 0):
            raise ValueError(f"lag must be a whole number of at least 0, got {self.lag!r}")
        self._check_values()

    def _check_top(self) -> None:
        if self.top is None:
            return
        if self.correction_weights_T is not None:
            raise ValueError("top and correction_weights_T: expected one of them, a corrected weight is none that score centering knows")
        for name in ("logprobs_TK", "behaviour_logprobs_TK"):
            x = getattr(self.top, name)
            if x.dtype != torch.float32 or x.dim() != 2 or len(x) != self.shard.num_local_tokens or x.size(1) < 1:
                expected = f"[{self.shard.num_local_tokens}, K]"
                raise ValueError(f"top.{name} must be torch.float32 of shape {expected}, got {x.dtype} {list(x.shape)}")
        if self.top.logprobs_TK.shape != self.top.behaviour_logprobs_TK.shape:
            shapes = [list(x.shape) for x in (self.top.logprobs_TK, self.top.behaviour_logprobs_TK)]
            raise ValueError(f"top.logprobs_TK and behaviour_logprobs_TK must have one shape, got {shapes[0]} and {shapes[1]}")

    def _optional_streams(self) -> list[str]:
        return [name for name in ("correction_weights_T", "behaviour_entropies_T") if getattr(self, name) is not None]

    def _check_values(self) -> None:
        values = {name: getattr(self, name) for name in ("logprobs_T", "behaviour_logprobs_T", "advantages_T", *self._optional_streams())}
        if self.top is not None:  # a sum of log-probs is as finite as its terms; in float64, as a term may be the smallest fp32 number
            tops = {"top.logprobs_TK": self.top.logprobs_TK, "top.behaviour_logprobs_TK": self.top.behaviour_logprobs_TK}
            values |= {name: x_TK.detach().sum(1, dtype=torch.float64) for name, x_TK in tops.items()}
        names = list(values)
        finite = torch.stack([torch.isfinite(x.detach()) for x in values.values()])
        wrong_T = self.loss_mask_T & ~(finite.all(0) & ~self.shard.padding_T)
        if not wrong_T.any():  # the only wait for the device
            return
        t = int(wrong_T.nonzero()[0, 0])
        where = f"sequence {int(self.shard.sequence_id_T[t])}, position {int(self.shard.position_T[t])}"
        if self.shard.padding_T[t]:
            raise ValueError(f"loss_mask_T is True at {where}, which is padding")
        name = names[int((~finite[:, t]).nonzero()[0, 0])]
        value = float(values[name][t])
        raise NonFiniteTokenError(
            f"{name} is {value} at {where} (cp_rank {self.shard.cp_rank}), where loss_mask_T is True; "
            f"{int(wrong_T.sum())} such tokens on this rank"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ObjectiveOutput:
    """What an objective makes of one TokenBatch. Everything adds up over ranks, micro-batches and (metrics) mini-batches."""

    loss: Float32[Tensor, ""]  # with gradient: this rank's share; summed over ranks and micro-batches it is the mini-batch's loss
    weights_T: Float32[Tensor, " T"]  # detached, 0 if masked: d loss / d logprobs_T = -weights_T * advantages_T / divisor
    metrics: dict[str, Float64[Tensor, " _"]]  # each kind of metrics.py adds up
    # For people who look at single tokens; None: the objective does not say.
    prefix_min_T: Float32[Tensor, " T"] | None = None  # detached: log of the smallest ratio among earlier trained tokens; at the first 0
    cumulative_T: Float32[Tensor, " T"] | None = None  # detached: log of the product of the ratios up to and with the token
    cut_T: UInt8[Tensor, " T"] | None = None  # a Cut: what a bound or a filter did to the weight; 0 if masked


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A named objective with all of its options: `objective(batch)` -> ObjectiveOutput. Build it with `make_objective`.

    Where `needs_minibatch_statistics` is True the loss depends on the mini-batch as a whole. The caller then first runs forward only:
    it sums `minibatch_statistics(batch)` over micro-batches and over the data- and context-parallel ranks, and passes the sum on
    with every batch: `objective(batch, statistics)`.
    """

    name: str
    options: Mapping[str, object]  # complete, published defaults included
    function: Callable[..., ObjectiveOutput] = field(repr=False)
    statistics_function: Callable[..., Tensor] | None = field(repr=False)  # takes the same options
    needs_behaviour_entropies: bool = False
    centers_scores: bool = False  # where a batch has top tokens
    metric_names: frozenset[str] = frozenset()  # keys of ObjectiveOutput.metrics

    @property
    def needs_minibatch_statistics(self) -> bool:
        return self.statistics_function is not None

    def minibatch_statistics(self, batch: TokenBatch) -> Float64[Tensor, " B"]:
        """This batch's share of what the objective must know of the whole mini-batch: float64, one axis, to be summed."""
        if self.statistics_function is None:
            raise ValueError(f"objective {self.name!r} needs no mini-batch statistics")
        return self.statistics_function(batch, **self.options)

    def __call__(self, batch: TokenBatch, statistics: Float64[Tensor, " B"] | None = None) -> ObjectiveOutput:
        """Loss, weights and metrics of one batch. Raises ValueError if statistics are missing, or given to an objective that takes none."""
        if (statistics is not None) != self.needs_minibatch_statistics:
            have = "were given but it needs none" if statistics is not None else "are missing: sum minibatch_statistics(batch) first"
            raise ValueError(f"objective {self.name!r}: mini-batch statistics {have}")
        if statistics is None:
            return self.function(batch, **self.options)
        return self.function(batch, statistics, **self.options)
