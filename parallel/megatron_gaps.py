"""Works around what Megatron-Core lacks where TransformerEngine and Apex are absent, on CPU and CUDA alike.

1. The router names `te_general_gemm`, which exists only with TransformerEngine (0.16.1): NameError at its first call.
2. torch's AdamW keeps a `step` in its state that Megatron's fully reshardable checkpoint does not carry: KeyError when it is loaded.
3. Its linear layers add weight gradients to its buffer with Apex's kernels only. `weight_gradient.py` replaces them.
4. Its own norm of all gradients reads a number off the device for every parameter: here the result alone is read, by its caller.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils
from megatron.core.utils import local_multi_tensor_l2_norm

from parallel import weight_gradient

_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_states_keeping_step(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> Any:
    if "step" not in tensors:
        group_index, group_order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][group_order]]
        if "step" in state:
            tensors = {**tensors, "step": state["step"]}
    return _set_states(self, model_param, tensors)


def _norm_of_all(_: Any, __: Any, tensor_lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
    """fp32 [1]. As `multi_tensor_l2norm` of Apex and TransformerEngine; bit for bit Megatron-Core's own on a CPU."""
    assert not per_tensor
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensor_lists[0], dtype=torch.float32)))[None], None


def close() -> None:
    """Correct all. Idempotent. With TransformerEngine's names, Apex's kernels and its optimizer, which keeps no `step`, nothing changes."""
    vars(moe_utils).setdefault("te_general_gemm", None)
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states_keeping_step
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm_of_all
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = weight_gradient
        layers._grad_accum_fusion_available = True
