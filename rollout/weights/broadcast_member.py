"""A server's membership in the weight sync's group, made as SGLang makes it, with torch alone.

What broadcast_group.py says of the store and of its prefixes holds here too. A trial of the broadcast runs this in the servers' own
environment, before there are servers.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist
from torch import Tensor

from rollout.weights.broadcast_group import DEVICE_TYPE, Backend


def receive(
    tensor: Tensor, *, name: str, rank: int, world_size: int, backend: Backend, master_address: str, master_port: int, timeout_s: float
) -> Tensor:
    """Join, receive one broadcast into `tensor`, which is returned, and leave.

    Args:
        tensor: contiguous, on the backend's device.
        name: of the group.
        rank: 1 or more; 0 is the trainer.
        world_size: of the group.
        backend: gloo or nccl.
        master_address: of the trainer.
        master_port: of its store.
        timeout_s: of joining and of the broadcast.

    Raises:
        RuntimeError: torch's reason, after the time limit at the latest.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    counted = dist.TCPStore(master_address, master_port, world_size, False, timeout, wait_for_workers=True)
    store = dist.PrefixStore(f"{DEVICE_TYPE[backend]}/", dist.PrefixStore(f"{name}/", dist.PrefixStore(name, counted)))
    if backend == "gloo":
        group: Any = dist.ProcessGroupGloo(store, rank, world_size, timeout=timeout)
    else:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, world_size, options)
    broadcast = dist.BroadcastOptions()
    broadcast.rootRank = 0
    broadcast.rootTensor = 0
    group.broadcast([tensor], broadcast).wait()
    return tensor
