"""The optimizer's moments, made directly: zeros for every parameter, and no step counted.

torch's AdamW makes its state at the first step only. Without state Megatron can neither save a checkpoint before that step nor load one
into a fresh optimizer. Megatron's own remedy is a step with gradients of zero. These gradients are as large as all fp32 master weights
of the rank, and they made the construction the largest moment of a run.
"""

from __future__ import annotations

from typing import Any

import torch

from parallel.mcore import HybridDeviceOptimizer


def create_state(optimizer: Any) -> None:
    """Give one of Megatron's distributed optimizers the state that it has before its first step.

    Args:
        optimizer: a DistributedOptimizer whose parameter groups have their final settings. It must have no state yet.
    """
    inner = optimizer.optimizer
    if isinstance(inner, HybridDeviceOptimizer):  # optimizer_cpu_offload: several optimizers, each with its own copies of parameters
        inner._sync_hdo_param_groups_to_sub_optimizers()
        for each in inner.sub_optimizers:
            _create(each, precision_aware=False)  # Megatron gives its parts no dtypes of their own
        inner._sync_sub_optimizers_state_to_hdo()
    else:
        _create(inner, precision_aware=optimizer.config.use_precision_aware_optimizer)


def _create(inner: torch.optim.Optimizer, *, precision_aware: bool) -> None:
    if isinstance(inner, torch.optim.AdamW):
        for parameter in _parameters(inner):
            inner.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # the fused step wants it beside the parameter
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return
    # TransformerEngine's or Apex's FusedAdam, which count steps per group.
    if precision_aware:
        inner.step()  # without gradients: TransformerEngine makes moments and master weights in their dtypes, and moves no weight
    else:
        for parameter in _parameters(inner):
            inner.state[parameter] = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    for group in inner.param_groups:
        if group["params"]:
            group["step"] = 0


def _parameters(inner: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in inner.param_groups for parameter in group["params"]]
