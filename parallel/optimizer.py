"""Megatron's distributed optimizer with the settings that reinforcement learning uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from parallel.mcore import (
    DistributedDataParallel,
    OptimizerConfig,
    clip_grad_by_total_norm_fp32,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from parallel.megatron_options import check_options
from parallel.optimizer_settings import OptimizerSettings
from parallel.optimizer_state import create_state

OPTIMIZER_FIELDS = frozenset(field.name for field in dataclasses.fields(OptimizerConfig))


NOT_OFFERED: Mapping[str, Any] = {
    # Megatron would divide gradients by a scale that no loss here is multiplied by.
    "fp16": False,
    "loss_scale": None,
    # Every group gets the rate of `set_learning_rate`; `clip_and_step` counts nothing.
    "min_lr": None,
    "decoupled_lr": None,
    "decoupled_min_lr": None,
    "log_num_zeros_in_grad": False,
}


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], settings: OptimizerSettings, *, dtype: torch.dtype, options: Mapping[str, Any]
) -> Any:
    """Distributed AdamW over dense and expert parameters; state is sharded over the replicas of each.

    The learning rate is set before every step (`set_learning_rate`). Raises ValueError naming a bad option.
    """
    fixed: dict[str, Any] = {
        "optimizer": "adam",
        "lr": 0.0,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_eps": settings.eps,
        "clip_grad": settings.gradient_clip,
        "use_distributed_optimizer": True,
        "overlap_param_gather_with_optimizer_step": False,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        **NOT_OFFERED,
    }
    check_options(options, OPTIMIZER_FIELDS, fixed, section="megatron")
    config = OptimizerConfig(**{**fixed, **options})
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=get_standard_config_overrides(config))
    apply_settings(optimizer, settings)
    for each in inner_optimizers(optimizer):
        create_state(each)
    return optimizer


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Megatron chains one distributed optimizer per kind of parameter (dense, expert)."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def apply_settings(optimizer: Any, settings: OptimizerSettings) -> None:
    """Give every parameter group these betas and eps, and torch's AdamW its fused step. Decay comes with every learning rate."""
    for each in inner_optimizers(optimizer):
        for group in each.optimizer.param_groups:
            group["betas"], group["eps"] = settings.betas, settings.eps
            if isinstance(each.optimizer, torch.optim.AdamW):  # Apex and TransformerEngine bring fused ones of their own
                group["fused"] = True


def set_learning_rate(optimizer: Any, learning_rate: float, *, weight_decay: float) -> None:
    """Give every parameter group its rate and its decay (Megatron leaves both to its own scheduler)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def clip_and_step(optimizer: Any, *, grad_norm: float) -> None:
    """What Megatron's `step` does after `prepare_grads`, with the norm that is known already: it would compute it again."""
    for each in inner_optimizers(optimizer):
        if each.config.clip_grad > 0.0 and not each.is_stub_optimizer:
            clip_grad_by_total_norm_fp32(
                each.get_parameters(),
                max_norm=each.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=each.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
