"""Megatron's distributed optimizer with the settings that reinforcement learning uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.mcore import DistributedDataParallel, OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from parallel.model import check_options

OPTIMIZER_FIELDS = frozenset(field.name for field in dataclasses.fields(OptimizerConfig))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101). Vectors (norms) are not decayed."""

    weight_decay: float
    betas: tuple[float, float]
    eps: float
    gradient_clip: float


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
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
    }
    check_options(options, OPTIMIZER_FIELDS, fixed, section="megatron")
    config = OptimizerConfig(**{**fixed, **options})
    return get_megatron_optimizer(config, list(chunks), config_overrides=get_standard_config_overrides(config))


def set_learning_rate(optimizer: Any, learning_rate: float, *, weight_decay: float) -> None:
    """Give every parameter group its rate and its decay (Megatron leaves both to its own scheduler)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
