"""Which kernel torch's attention is on CUDA. A torch built for CPUs would silently compute the scores, and the peak would be wrong.

Rules of torch 2.13 on Hopper for what this project asks for (no dropout): flash attention takes 16-bit heads without a mask; cuDNN takes
16-bit heads with one; the memory-efficient kernel takes fp32, and repeats grouped heads; else the scores are computed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["flash", "cudnn", "efficient", "math"]
_HALF = (torch.bfloat16, torch.float16)


def choose(query: Tensor, key: Tensor, mask: Tensor | None) -> Kernel:
    """The kernel that CUDA would take."""
    if query.dtype in _HALF:
        return "flash" if mask is None else "cudnn"
    return "efficient" if query.size(1) == key.size(1) else "math"


def install() -> None:
    """Replace torch.nn.functional.scaled_dot_product_attention for fake CUDA tensors, for the rest of the process."""
    on_cpu = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if query.device.type != "cuda":
            return on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        aten = torch.ops.aten
        kernel = choose(query, key, attn_mask)
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        if kernel == "efficient":
            bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.size(2))
            return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    F.scaled_dot_product_attention = attention
