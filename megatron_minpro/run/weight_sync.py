"""rollout.weight_sync: how new weights travel to the servers. A plug-in is called with a WeightSyncContext and gives a WeightSync."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.policy_folder import export_policy
from megatron_minpro.config import RunConfig
from megatron_minpro.registry import PlugIns
from parallel.capabilities import detect
from rollout.weights.weight_sync import CollectiveWeightSync, DiskWeightSync, WeightSync

WEIGHT_SYNCS = PlugIns(
    setting="rollout.weight_sync",
    options="rollout",
    known={"collective": "megatron_minpro.run.weight_sync:collective", "disk": "megatron_minpro.run.weight_sync:disk"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSyncContext:
    """What a weight sync may need to know."""

    config: RunConfig
    run_dir: Path
    endpoints: list[str]  # http://host:port of every server
    api_key: str | None = field(repr=False)
    admin_key: str | None = field(repr=False)


def make_weight_sync(context: WeightSyncContext) -> WeightSync:
    """The one that rollout.weight_sync names. Raises PlugInError when there is none."""
    return WEIGHT_SYNCS.find(context.config.rollout.weight_sync, {}, passed=1)(context)


def collective(context: WeightSyncContext) -> WeightSync:
    """Trainer and servers share a process group."""
    return CollectiveWeightSync(
        context.endpoints,
        tp=context.config.rollout.tp,
        backend=detect().backend,
        master_address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        api_key=context.api_key,
        admin_key=context.admin_key,
        timeout_s=context.config.rollout.request_timeout_s,
    )


def disk(context: WeightSyncContext) -> WeightSync:
    """The servers read a folder that the trainer writes."""
    directory = context.run_dir / "published_weights"
    directory.mkdir(exist_ok=True)
    model = context.config.model
    folder, dtype = Path(model.path), DTYPES[model.dtype]
    return DiskWeightSync(
        context.endpoints,
        write_checkpoint=lambda path, tensors: export_policy(path, tensors, dtype=dtype, like=folder, replace=True),
        directory=directory,
        api_key=context.api_key,
        admin_key=context.admin_key,
        timeout_s=context.config.rollout.request_timeout_s,
    )
