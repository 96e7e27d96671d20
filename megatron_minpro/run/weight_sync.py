"""rollout.weight_sync: how new weights travel to the servers. A plug-in is called with a WeightSyncContext and gives a WeightSync,
or with publish: rolling a WeightKeeper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.policy_folder import export_policy
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.server_weights import RollingWeights, TogetherWeights
from megatron_minpro.registry import PlugInError, PlugIns
from megatron_minpro.run.server_limits import weight_limits
from parallel.capabilities import detect
from rollout.routes import route_to_others
from rollout.weights.collective import CollectiveWeightSync
from rollout.weights.disk import DiskWeightSync
from rollout.weights.keeper import CollectiveKeeper, DiskKeeper, WeightKeeper
from rollout.weights.weight_sync import WeightSync

WEIGHT_SYNCS = PlugIns(
    setting="rollout.weight_sync",
    options="rollout",
    known={"collective": "megatron_minpro.run.weight_sync:collective", "disk": "megatron_minpro.run.weight_sync:disk"},
)

WEIGHT_KEEPERS = PlugIns(
    setting="rollout.weight_sync",
    options="rollout",
    known={name: f"{function}_keeper" for name, function in WEIGHT_SYNCS.known.items()},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSyncContext:
    """What a weight sync may need to know."""

    config: RunConfig
    run_dir: Path
    endpoints: list[str]  # http://host:port of every server
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


def weight_plug_ins(config: RunConfig) -> PlugIns:
    """What rollout.weight_sync may name in this run."""
    return WEIGHT_KEEPERS if config.rollout.publish == "rolling" else WEIGHT_SYNCS


def make_server_weights(context: WeightSyncContext) -> TogetherWeights | RollingWeights:
    """The way that rollout.weight_sync and rollout.publish name. Raises PlugInError when there is none."""
    config = context.config
    made = weight_plug_ins(config).find(config.rollout.weight_sync, {}, passed=1)(context)
    keys = {"api_key": context.api_key, "admin_key": context.admin_key}
    dtype = DTYPES[config.rollout.dtype]
    if config.rollout.publish == "together":
        return TogetherWeights(made, dtype=dtype, **keys)
    if not isinstance(made, WeightKeeper):
        name = config.rollout.weight_sync
        raise PlugInError("rollout.weight_sync", name, "expected offer, give and forget (rollout/weights/keeper.py) with publish: rolling")
    return RollingWeights(made, dtype=dtype, **keys)


def collective(context: WeightSyncContext) -> WeightSync:
    """Trainer and servers share a process group."""
    return CollectiveWeightSync(context.endpoints, **_collective_options(context))


def collective_keeper(context: WeightSyncContext) -> WeightKeeper:
    """The trainer shares a process group with each server."""
    return CollectiveKeeper(context.endpoints, **_collective_options(context))


def disk(context: WeightSyncContext) -> WeightSync:
    """The servers read a folder that the trainer writes."""
    return DiskWeightSync(context.endpoints, **_disk_options(context))


def disk_keeper(context: WeightSyncContext) -> WeightKeeper:
    """Each server reads one of the folders that the trainer writes."""
    return DiskKeeper(context.endpoints, **_disk_options(context))


def _collective_options(context: WeightSyncContext) -> dict[str, Any]:
    return {
        "tp": context.config.rollout.tp,
        "backend": detect().backend,
        # Of this machine, the address on the way to the servers: its own name may mean 127.0.1.1 here.
        "master_address": route_to_others(urlsplit(endpoint).hostname or "" for endpoint in context.endpoints).address,
        **_common_options(context),
    }


def _disk_options(context: WeightSyncContext) -> dict[str, Any]:
    directory = context.run_dir / "published_weights"
    directory.mkdir(exist_ok=True)
    model = context.config.model
    folder, dtype = Path(model.path), DTYPES[model.dtype]
    return {
        "write_checkpoint": lambda path, tensors: export_policy(path, tensors, dtype=dtype, like=folder, replace=True),
        "directory": directory,
        **_common_options(context),
    }


def _common_options(context: WeightSyncContext) -> dict[str, Any]:
    return {"api_key": context.api_key, "admin_key": context.admin_key, "limits": weight_limits(context.config)}
