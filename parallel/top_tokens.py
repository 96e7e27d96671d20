"""The K tokens that the sampler held most likely wherever it sampled one, on their way into a micro-batch. Needs no Megatron-Core.

Shapes: R trained tokens of a sequence, T local packed tokens, K ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from parallel.sequence_shard import SequenceShard


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class TopTokens:
    """Of one sequence, a row for each trained token in order. The tensors may be views of a mapped file: only rows that are used are read.

    The ids of a row are all different, and in the model's vocabulary. Raises ValueError for other dtypes and for unequal shapes.
    """

    ids: Int32[Tensor, "R K"]
    logprobs: Float32[Tensor, "R K"]  # of these tokens, under the distribution that was sampled from

    def __post_init__(self) -> None:
        for name, dtype in (("ids", torch.int32), ("logprobs", torch.float32)):
            x = getattr(self, name)
            if x.dtype != dtype or x.dim() != 2:
                raise ValueError(f"top {name}: {x.dtype} {list(x.shape)}, expected {dtype} with two axes")
        if self.ids.shape != self.logprobs.shape:
            raise ValueError(f"top logprobs: shape {list(self.logprobs.shape)}, expected {list(self.ids.shape)} as the ids")

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    @property
    def top_k(self) -> int:
        return self.ids.size(1)


def even_top_tokens(num_rows: int, top_k: int) -> TopTokens:
    """Rows that nobody sampled: the first ids, each as likely as the others and all of them together half of everything."""
    logprobs = torch.full((1, 1), -math.log(2 * top_k)).expand(num_rows, top_k)
    return TopTokens(ids=torch.arange(top_k, dtype=torch.int32).expand(num_rows, top_k), logprobs=logprobs)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class ScoredTopTokens:
    """What a loss gets of them."""

    logprobs_TK: Float[Tensor, "T K"]  # under the policy that is trained, with gradient
    behaviour_logprobs_TK: Float[Tensor, "T K"]  # under the distribution that was sampled from


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class PackedTopTokens:
    """Where a rank's rows of packed sequences are. Nothing is read before `read`: rows are far larger than all other streams together."""

    per_sequence: tuple[TopTokens, ...]
    rows: tuple[Int64[Tensor, " _"], ...]  # of each sequence: its rows that this rank holds
    place: Int64[Tensor, " _"]  # where they stand among the local tokens, one sequence after the other
    num_local_tokens: int

    @classmethod
    def of(
        cls,
        per_sequence: Sequence[TopTokens],
        loss_masks: Sequence[Bool[Tensor, " _"]],
        shard: SequenceShard,
        loss_mask_T: Bool[Tensor, " T"],
    ) -> PackedTopTokens:
        """
        Args:
            per_sequence: of the sequences in packing order, as many tokens in each row.
            loss_masks: of the sequences, on logit positions.
            shard: cuts them. On the CPU, as all of this.
            loss_mask_T: their local part.
        """
        row_T = shard.local([mask.long().cumsum(0) - 1 for mask in loss_masks], fill=0)
        place = loss_mask_T.nonzero()[:, 0]
        counts = shard.sequence_id_T[place].bincount(minlength=shard.num_sequences).tolist()
        return cls(per_sequence=tuple(per_sequence), rows=row_T[place].split(counts), place=place, num_local_tokens=shard.num_local_tokens)

    def read(self, device: torch.device) -> tuple[Int64[Tensor, "T K"], Float32[Tensor, "T K"]]:
        """The ids and log-probs of this rank's tokens, on `device`: 0 where nothing is trained. Waits for no device."""
        shape = (self.num_local_tokens, self.per_sequence[0].top_k)
        ids, logprobs = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
        chosen = list(zip(self.per_sequence, self.rows, strict=True))
        ids[self.place] = torch.cat([tokens.ids[rows] for tokens, rows in chosen]).long()
        logprobs[self.place] = torch.cat([tokens.logprobs[rows] for tokens, rows in chosen])
        return ids.to(device, non_blocking=True), logprobs.to(device, non_blocking=True)
