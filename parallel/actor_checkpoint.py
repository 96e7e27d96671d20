"""Model and optimizer as a Megatron torch_dist checkpoint that another layout can load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.mcore import dist_checkpointing, ensure_metadata_has_dp_cp_group
from parallel.model import HiddenStateModel


def _sharded_state(modules: Sequence[HiddenStateModel], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    metadata = ensure_metadata_has_dp_cp_group(
        {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    )
    state: dict[str, Any] = {}
    for index, module in enumerate(modules):
        state["model" if len(modules) == 1 else f"model{index}"] = module.sharded_state_dict(metadata=metadata)
    # Under virtual pipeline stages Megatron's optimizer expects the same keys.
    state["optimizer"] = optimizer.sharded_state_dict(
        state if len(modules) > 1 else state["model"], is_loading=is_loading, metadata=metadata
    )
    return state


def save(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. directory: existing and empty, the same path on all ranks. Durable only once the caller has synced and renamed it."""
    dist_checkpointing.save(_sharded_state(modules, optimizer, is_loading=False), str(directory))


def load(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. Raises what Megatron raises for an absent or mismatching checkpoint."""
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    for each in optimizers:
        # torch's AdamW creates its state at the first step; without it there is nothing to load into.
        each._init_optimizer_states_with_dummy_values()
    state = dist_checkpointing.load(_sharded_state(modules, optimizer, is_loading=True), str(directory))
    for index, module in enumerate(modules):
        module.load_state_dict(state["model" if len(modules) == 1 else f"model{index}"])
    optimizer.load_state_dict(state["optimizer"])
    for each in optimizers:
        for values in each.optimizer.state.values():
            if "step" in values:
                # All parameters would share one counter, and every step would advance it once per parameter.
                values["step"] = values["step"].clone()
    dist.barrier()
    assert all(torch.isfinite(values["step"]).all() for each in optimizers for values in each.optimizer.state.values() if "step" in values)
