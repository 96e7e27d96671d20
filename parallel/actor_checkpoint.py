"""Model and optimizer as a Megatron torch_dist checkpoint that another layout can load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from checkpoints_convert.checkpoint_pickle import check_metadata
from parallel.mcore import dist_checkpointing, ensure_metadata_has_dp_cp_group
from parallel.model import HiddenStateModel
from parallel.optimizer import inner_optimizers


def _sharded_model(modules: Sequence[HiddenStateModel]) -> dict[str, Any]:
    metadata = _metadata()
    return {_model_key(modules, index): module.sharded_state_dict(metadata=metadata) for index, module in enumerate(modules)}


def _sharded_state(modules: Sequence[HiddenStateModel], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    state = _sharded_model(modules)
    # Under virtual pipeline stages Megatron's optimizer expects the same keys.
    state["optimizer"] = optimizer.sharded_state_dict(
        state if len(modules) > 1 else state["model"], is_loading=is_loading, metadata=_metadata()
    )
    return state


def _metadata() -> dict[str, Any]:
    return ensure_metadata_has_dp_cp_group(
        {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True, "singleton_local_shards": False}
    )


def _model_key(modules: Sequence[HiddenStateModel], index: int) -> str:
    return "model" if len(modules) == 1 else f"model{index}"


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Every torch.load inside the block refuses pickled code, also where a library asks it not to."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    former = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if former is None:
            del os.environ[name]
        else:
            os.environ[name] = former


def save(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. directory: existing and empty, the same path on all ranks. Durable only once the caller has synced and renamed it."""
    dist_checkpointing.save(_sharded_state(modules, optimizer, is_loading=False), str(directory))


def load(directory: Path, modules: Sequence[HiddenStateModel], optimizer: Any) -> None:
    """Collective. Raises ValueError for files that hold anything but a checkpoint, what Megatron raises for a mismatching one."""
    state = _load(directory, modules, _sharded_state(modules, optimizer, is_loading=True))
    optimizer.load_state_dict(state["optimizer"])
    for each in inner_optimizers(optimizer):
        for values in each.optimizer.state.values():
            if "step" in values:
                # All parameters would share one counter, and every step would advance it once per parameter.
                values["step"] = values["step"].clone()
    dist.barrier()


def load_model(directory: Path, modules: Sequence[HiddenStateModel]) -> None:
    """Collective. The model alone, from a checkpoint with or without an optimizer. Errors as `load`."""
    _load(directory, modules, _sharded_model(modules))
    dist.barrier()


def _load(directory: Path, modules: Sequence[HiddenStateModel], sharded: dict[str, Any]) -> dict[str, Any]:
    check_metadata(directory / ".metadata")
    with _tensors_only():
        state = dist_checkpointing.load(sharded, str(directory))
    for index, module in enumerate(modules):
        module.load_state_dict(state[_model_key(modules, index)])
    return state
