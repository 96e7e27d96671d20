"""The check after building: the actor's log-probs against a plain forward pass over the weights that it exports.

If an option, a layer or a row of the mapping table makes the trained model differ from the model that samples, this check finds it, also
when the difference was not foreseen. One weight stream and some hundred tokens on rank 0: a model of any size can be checked.

Not checked: gradients, and a difference that is smaller than the rounding of the trainer's dtype (float32: 1e-5, bfloat16: about 0.02).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.actor import MegatronActor
from parallel.plain_forward import plain_logprobs
from parallel.token_sequence import TokenSequence
from parallel.weights import take_part

# How far the actor may be off, as a multiple of what one plain pass in its own dtype is off.
_ROUNDINGS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """What is allowed on top. median: for all tokens alike. mean: also for the few whose nearly tied experts rounding changes."""

    median: float
    mean: float


_ALLOWED = {
    torch.float32: Allowance(median=1e-5, mean=0.01),
    torch.bfloat16: Allowance(median=0.004, mean=0.02),
}
_ALLOWED_FP8 = Allowance(median=0.25, mean=0.5)  # products of numbers with 3 bits of mantissa; no plain pass computes in them


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCheck:
    """Differences of log-probs from a plain pass in float64, nats per token. Equal on all ranks."""

    num_tokens: int
    median: float
    mean: float
    largest: float
    allowed_median: float
    allowed_mean: float

    @property
    def passed(self) -> bool:
        """False also for a NaN."""
        return self.median <= self.allowed_median and self.mean <= self.allowed_mean

    def line(self) -> str:
        """One line for the log."""
        return (
            f"trained model and exported weights in a plain forward pass: log-probs of {self.num_tokens} tokens differ by "
            f"{self.median:.2g} in the median (allowed {self.allowed_median:.2g}), {self.mean:.2g} in the mean "
            f"(allowed {self.allowed_mean:.2g}), {self.largest:.2g} at most"
        )


def check_model(actor: MegatronActor, token_ids: Sequence[Sequence[int]], *, control_group: dist.ProcessGroup) -> ModelCheck:
    """Collective. Score the sequences with the actor and, on rank 0, with a plain forward pass over the exported weights.

    Args:
        actor: with weights.
        token_ids: sequences of at least 2 tokens, equal on all ranks. Text that the model knows shows more than random tokens.
        control_group: all ranks, for the verdict.

    Returns:
        The differences, within what rounding explains.

    Raises:
        ValueError: on all ranks, when the difference is larger than that.
    """
    sequences = [torch.tensor(ids, dtype=torch.int64) for ids in token_ids]
    scored = actor.logprobs(
        [TokenSequence(token_ids=ids, loss_mask=torch.ones(len(ids) - 1, dtype=torch.bool), streams={}) for ids in sequences]
    )
    box: list[ModelCheck | None] = [None]
    if dist.get_rank() == 0:
        box = [_compare(actor, sequences, torch.cat(scored))]
    else:
        take_part(actor.export_weights())
    dist.broadcast_object_list(box, src=0, group=control_group)
    [check] = box
    assert check is not None
    if not check.passed:
        raise ValueError(
            f"the actor trains another model than the one that its exported weights describe: {check.line()}; "
            "expected rounding alone (see the options under megatron:)"
        )
    return check


@torch.no_grad()
def _compare(actor: MegatronActor, sequences: Sequence[Tensor], scored: Tensor) -> ModelCheck:
    settings = actor.settings
    in_float64, in_own_dtype = (
        torch.cat(found)
        for found in plain_logprobs(
            actor.export_weights(),
            actor.architecture,
            sequences,
            temperature=settings.temperature,
            dtypes=(torch.float64, settings.dtype),
        )
    )
    gap, rounding = (scored.double() - in_float64).abs(), (in_own_dtype - in_float64).abs()
    low_precision = settings.megatron_options.get("fp8") or settings.megatron_options.get("fp4")
    allowance = _ALLOWED_FP8 if low_precision else _ALLOWED[settings.dtype]
    return ModelCheck(
        num_tokens=len(gap),
        median=float(gap.median()),
        mean=float(gap.mean()),
        largest=float(gap.max()),
        allowed_median=_ROUNDINGS * float(rounding.median()) + allowance.median,
        allowed_mean=_ROUNDINGS * float(rounding.mean()) + allowance.mean,
    )
