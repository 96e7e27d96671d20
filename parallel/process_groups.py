"""Process groups, built once at start and then passed as arguments."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.layout import ParallelLayout, RankCoordinates
from parallel.mcore import model_parallel_cuda_manual_seed, parallel_state


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroups:
    """Every group the actor communicates over. `control` is always gloo: it carries Python objects and long waits.

    `saving` is gloo too and belongs to the thread that writes checkpoints: collectives of two threads over one group would mix.
    """

    coordinates: RankCoordinates
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    etp: dist.ProcessGroup
    control: dist.ProcessGroup
    saving: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1


def initialize(layout: ParallelLayout, *, backend: str, seed: int, timeout_s: float) -> ProcessGroups:
    """Join torch.distributed (rank and addresses from the environment, as torchrun sets them) and build Megatron's groups.

    timeout_s: how long a collective may wait for its slowest rank. The control group waits as long: the ranks that do not
    sample wait there for the one that does.
    Raises ValueError when the launched world size is not the layout's.
    """
    launched = int(os.environ["WORLD_SIZE"])
    if launched != layout.world_size:
        raise ValueError(f"parallel: world_size={layout.world_size} but {launched} ranks were launched")
    timeout = datetime.timedelta(seconds=timeout_s)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=max(1, int(timeout_s // 60)),
    )
    model_parallel_cuda_manual_seed(seed)
    control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
    assert control is not None
    return ProcessGroups(
        coordinates=layout.coordinates(dist.get_rank()),
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        etp=parallel_state.get_expert_tensor_parallel_group(),
        control=control,
        saving=dist.new_group(backend="gloo", timeout=timeout),
    )


def shut_down() -> None:
    """Leave all groups; the counterpart of `initialize`."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
