"""A NaN in a log-prob that the loss uses: also when one rank alone sees it, all ranks stop together and say where it was.

A rank that raised in the middle of a forward pass would leave the others waiting in the next collective. So it goes on with a harmless
value. When the pass is over, all ranks exchange what they saw, before a result is used.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float32
from torch import Tensor

from parallel.packing import MicroBatch


class FiniteWatch:
    """Watches the log-probs of one pass over a mini-batch. What it sees stays on the device until the pass is over.

    T: this rank's packed tokens, L labels of each.
    """

    def __init__(self, *, rank: int, control_group: dist.ProcessGroup) -> None:
        self._rank = rank
        self._control_group = control_group
        self._micro_batches: list[tuple[int, ...]] = []  # which sequences each held
        self._seen: list[Tensor] = []  # of each: wrong tokens, and the first one's sequence there, position and value

    def screen(self, logprobs: Float32[Tensor, "T ..."], micro_batch: MicroBatch) -> Float32[Tensor, "T ..."]:
        """Log-probs, [T] or [T, L], with 0 in the rows that hold a NaN or infinity where the loss mask is set; remembers where the first
        one was."""
        found = logprobs.detach()
        sum_T = found if found.dim() == 1 else found.sum(1)  # as finite as its terms: they are log-probs
        wrong_T = micro_batch.loss_mask_T & ~sum_T.isfinite()
        first = wrong_T.int().argmax(0, keepdim=True)  # of one element: an index without an axis would be read, which waits
        of_first = (micro_batch.shard.sequence_id_T, micro_batch.shard.position_T, sum_T)
        facts = (wrong_T.sum(0, keepdim=True), *(x_T.index_select(0, first) for x_T in of_first))
        self._micro_batches.append(micro_batch.indices)
        self._seen.append(torch.cat([fact.double() for fact in facts]))
        return torch.where(wrong_T if logprobs.dim() == 1 else wrong_T[:, None], 0.0, logprobs)

    def _first(self) -> str | None:
        """What this rank found, in words. Waits for the device once."""
        if not self._seen or not torch.stack(self._seen)[:, 0].any():
            return None
        found = zip(self._micro_batches, torch.stack(self._seen).tolist(), strict=True)
        indices, (count, sequence, position, value) = next(entry for entry in found if entry[1][0])
        return (
            f"log-prob is {value} in sequence {indices[int(sequence)]}, position {int(position)}, on rank {self._rank} "
            f"({int(count)} such tokens in one micro-batch there)"
        )

    def raise_together(self, consequence: str) -> None:
        """Collective over all ranks. Raises FloatingPointError, the same on every rank, when any of them found something."""
        mine = self._first()
        affected = torch.tensor(int(mine is not None))
        dist.all_reduce(affected, group=self._control_group)
        if not affected:
            return
        found: list[str | None] = [None] * self._control_group.size()
        dist.all_gather_object(found, mine, group=self._control_group)
        first = next(text for text in found if text is not None)
        others = f"; {int(affected)} ranks found one" if affected > 1 else ""
        raise FloatingPointError(f"{first}{others}; {consequence}")
