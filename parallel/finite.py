"""A NaN in a log-prob that the loss uses: also when one rank alone sees it, all ranks stop together and say where it was.

A rank that raised in the middle of a forward pass would leave the others waiting in the next collective. So it goes on with a harmless
value. When the pass is over, all ranks exchange what they saw, before a result is used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.packing import MicroBatch


class FiniteWatch:
    """Watches the log-probs of one pass over a mini-batch. T: this rank's packed tokens."""

    def __init__(self, *, rank: int, control_group: dist.ProcessGroup) -> None:
        self._rank = rank
        self._control_group = control_group
        self._found: list[str] = []

    def screen(self, logprobs_T: Tensor, micro_batch: MicroBatch) -> Tensor:
        """logprobs_T with 0 in place of NaN and infinity where the loss mask is set; remembers where the first one was."""
        wrong_T = micro_batch.loss_mask_T & ~logprobs_T.detach().isfinite()
        if not wrong_T.any():
            return logprobs_T
        at = int(wrong_T.nonzero()[0, 0])
        shard = micro_batch.shard
        self._found.append(
            f"log-prob is {float(logprobs_T.detach()[at])} in sequence {micro_batch.indices[int(shard.sequence_id_T[at])]}, "
            f"position {int(shard.position_T[at])}, on rank {self._rank} ({int(wrong_T.sum())} such tokens in one micro-batch there)"
        )
        return torch.where(wrong_T, 0.0, logprobs_T)

    def raise_together(self, consequence: str) -> None:
        """Collective over all ranks. Raises FloatingPointError, the same on every rank, when any of them found something."""
        affected = torch.tensor(int(bool(self._found)))
        dist.all_reduce(affected, group=self._control_group)
        if not affected:
            return
        found: list[str | None] = [None] * self._control_group.size()
        dist.all_gather_object(found, self._found[0] if self._found else None, group=self._control_group)
        first = next(text for text in found if text is not None)
        others = f"; {int(affected)} ranks found one" if affected > 1 else ""
        raise FloatingPointError(f"{first}{others}; {consequence}")
