"""RMSNorm for Megatron-Core's layer spec where TransformerEngine is absent (the stock one refuses sequence parallelism)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.mcore import TransformerConfig


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last axis, statistics in fp32 (Zhang & Sennrich, arXiv:1910.07467, eq. 4).

    The order of casts is Qwen3's: normalise in fp32, cast back, then scale. Any input shape [..., hidden_size].
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums marked gradients over tensor-parallel ranks: each saw only its part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
