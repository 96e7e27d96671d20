"""One sequence on its way to the actor. A leaf: whoever makes sequences needs no Megatron-Core.

A sequence of L tokens is fed as its first L-1 tokens and labelled with its last L-1. Every per-token stream lies on these L-1 logit
positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Int64, Integer
from torch import Tensor

from parallel.top_tokens import TopTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSequence:
    """One sequence with what the loss needs of it. All streams lie on logit positions: entry p belongs to token p+1."""

    token_ids: Int64[Tensor, " L"]
    loss_mask: Bool[Tensor, " L-1"]
    streams: Mapping[str, Float32[Tensor, " L-1"]]
    experts: Integer[Tensor, "layers L-1 k"] | None = None  # rows that the routers replay (expert_rows.py); None: they choose
    top: TopTokens | None = None  # the sampler's most likely tokens at each trained position; None: the loss needs none

    def __post_init__(self) -> None:
        if self.token_ids.dtype != torch.int64 or self.token_ids.dim() != 1:
            raise ValueError(f"token_ids: {self.token_ids.dtype} {tuple(self.token_ids.shape)}, expected torch.int64 and one axis")
        length = len(self.token_ids)
        if length < 2:
            raise ValueError(f"token_ids: a sequence needs at least 2 tokens, this one has {length}")
        for name, stream in {"loss_mask": self.loss_mask, **self.streams}.items():
            if stream.shape != (length - 1,):
                raise ValueError(f"{name}: shape {tuple(stream.shape)}, expected ({length - 1},) for {length} tokens")
        if self.loss_mask.dtype != torch.bool:
            raise ValueError(f"loss_mask: dtype {self.loss_mask.dtype}, expected torch.bool")
        for name, stream in self.streams.items():
            if stream.dtype != torch.float32:
                raise ValueError(f"{name}: dtype {stream.dtype}, expected torch.float32")
        if self.experts is not None and (self.experts.dim() != 3 or self.experts.size(1) != length - 1):
            raise ValueError(f"experts: shape {tuple(self.experts.shape)}, expected (layers, {length - 1}, k) for {length} tokens")
        if self.top is not None and self.top.num_rows != (trained := int(self.loss_mask.sum())):
            raise ValueError(f"top: {self.top.num_rows} rows, expected {trained}, one for each True of loss_mask")

    @property
    def num_positions(self) -> int:
        return len(self.token_ids) - 1
