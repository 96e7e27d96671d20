"""Weight gradients added where they are kept: what Apex's kernels do for Megatron-Core's linear layers, where Apex is absent or on a CPU.

Without it a gradient is a fresh tensor first and Megatron adds it to its buffer afterwards. The functions have the kernels' names, and
Megatron-Core calls them where `gradient_accumulation_fusion` is set.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wgrad_gemm_accum_fp32(input_TI: Tensor, grad_TO: Tensor, main_grad_OI: Tensor) -> None:
    """main_grad += grad.T @ input, summed in main_grad's dtype: [T, I], [T, O] -> [O, I] in place."""
    if input_TI.is_cuda and input_TI.dtype != main_grad_OI.dtype:  # one product of 16-bit numbers that is summed in fp32
        torch.addmm(main_grad_OI, grad_TO.t(), input_TI, out_dtype=main_grad_OI.dtype, out=main_grad_OI)
    else:
        main_grad_OI.addmm_(grad_TO.t().to(main_grad_OI.dtype), input_TI.to(main_grad_OI.dtype))


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
