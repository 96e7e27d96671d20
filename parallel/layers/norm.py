"""RMSNorm for Megatron-Core's layer spec where TransformerEngine is absent (the stock one refuses sequence parallelism)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        marked: Any = self.weight
        marked.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one number a row; autograd of the formula keeps three more tensors of that size and passes over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = ctx.saved_tensors
        wide_grad, wide_weight = grad.float(), weight.float()
        normed = x.float() * scale
        product = wide_grad * normed
        grad_weight = product.reshape(-1, x.size(-1)).sum(0)
        along = (product @ wide_weight).div_(x.size(-1)).unsqueeze(-1)
        grad_x = (wide_grad * wide_weight).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
