"""Weights by a broadcast from the trainer's rank 0 into the servers' memory."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.background import in_background
from rollout.sglang.control import ServerRefused
from rollout.weights.broadcast_group import Backend, BroadcastGroup
from rollout.weights.buckets import fill_buckets
from rollout.weights.completeness import CompletenessCheck
from rollout.weights.server_set import ServerSet
from rollout.weights.time_limits import BucketLimits, WeightTimeLimits
from rollout.weights.update import update
from rollout.weights.weight_sync import InFlight, NamedTensors, WeightSyncFailed

_TORCH_IS_MORE_PATIENT = 10  # times than this file, which gives up in time


class CollectiveWeightSync:
    """Broadcast from this process (rank 0 of the trainer) into the servers' memory: gloo between CPUs, NCCL between GPUs.

    tp: of each server. master_address: this host as the servers reach it. bucket_bytes: tensors travel in flat buckets of about this
    size (a larger tensor alone makes its own); memory needed on both sides: one bucket.
    in_flight: as for DiskWeightSync. limits: of joining, and of each step of an update.
    The group is made at the first publish, and made anew when the servers are others than at the last one (one is gone, back, or was
    restarted) or when the last publish failed.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tp: int = 1,
        backend: Backend = "gloo",
        master_address: str = "127.0.0.1",
        bucket_bytes: int = 512 * 2**20,
        api_key: str | None = None,
        admin_key: str | None = None,
        in_flight: InFlight = "retract",
        limits: WeightTimeLimits | None = None,
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"weight sync: bucket_bytes is {bucket_bytes}, expected at least 1")
        self._servers = ServerSet(endpoints, api_key=api_key, admin_key=admin_key, limits=limits or WeightTimeLimits())
        self._complete = CompletenessCheck(self._servers)
        self._tp = tp
        self._backend: Backend = backend
        self._master_address = master_address
        self._bucket_bytes = bucket_bytes
        self._in_flight = in_flight
        self._group: BroadcastGroup | None = None

    @property
    def num_restarts(self) -> int:
        return self._servers.num_restarts

    def publish(self, policy_version: int, tensors: NamedTensors) -> tuple[str, ...]:
        """Send the tensors bucket by bucket. The servers pause when the first bucket is full, and continue when the last is loaded.

        Raises WeightSyncFailed when no server took them, ValueError when tensors are missing.
        """
        unchanged = self._servers.gather(policy_version)
        if self._group is None or not unchanged:
            self._leave()
            self._join(policy_version)
        buckets = fill_buckets(self._complete.watch(tensors), bucket_bytes=self._bucket_bytes)
        first = next(buckets, None)
        if first is None:
            raise ValueError("weight sync: no tensors were given")
        try:
            limits = self._servers.limits
            bucket_limits = BucketLimits(limits)
            with update(self._servers, policy_version, self._in_flight):
                self._servers.tell("/begin_weight_update", {})
                bucket: list[tuple[str, Tensor]] | None = first
                while bucket is not None:
                    self._send(bucket, bucket_limits)
                    bucket = next(buckets, None)
                self._servers.tell("/end_weight_update", {}, limit_s=limits.step_s)
        except WeightSyncFailed:
            self._leave()
            self._servers.try_to_tell("/end_weight_update", {})  # otherwise a server would refuse to begin again
            raise
        return self._servers.members

    def close(self) -> None:
        """Leave the group; servers that are still alive leave it too."""
        self._leave()

    def _leave(self) -> None:
        if self._group is None:
            return
        # First this end, for the reason given in _send.
        self._group.close()
        self._servers.try_to_tell("/destroy_weights_update_group", {"group_name": self._group.name})
        self._group = None

    def _join(self, policy_version: int) -> None:
        members, limit_s = self._servers.members, self._servers.limits.step_s
        self._group = BroadcastGroup(
            # A name of its own: a server refuses nothing about an old group of the same name, it would silently use it.
            name=f"weight_sync_{uuid.uuid4().hex[:12]}",
            world_size=1 + self._tp * len(members),
            backend=self._backend,
            master_address=self._master_address,
            timeout_s=limit_s,
            broadcast_s=_TORCH_IS_MORE_PATIENT * self._servers.limits.moving(self._bucket_bytes),
        )
        bodies = [
            {
                "master_address": self._group.master_address,
                "master_port": self._group.port,
                "rank_offset": 1 + index * self._tp,
                "world_size": self._group.world_size,
                "group_name": self._group.name,
                "backend": self._group.backend,
            }
            for index in range(len(members))
        ]
        calls = self._servers.begin("/init_weights_update_group", bodies, limit_s=limit_s)
        # In the background: where a server refuses, joining would end only at the time limit, so it runs in a thread.
        joined = in_background(self._group.join, name="weight sync join")
        try:
            self._wait_for(joined.done, calls, limit_s=limit_s, what="joining the weight sync group")
            try:
                joined.result()
            except RuntimeError as error:
                raise ServerRefused(f"joining the weight sync group: {error}") from error
            self._servers.collect(calls)
        except ServerRefused as error:
            self._leave()
            raise WeightSyncFailed(f"policy version {policy_version}: cannot join the weight sync group: {error}") from error

    def _send(self, bucket: list[tuple[str, Tensor]], limits: BucketLimits) -> None:
        assert self._group is not None
        flat = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in bucket]).to(self._group.device)
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        limit_s, began = limits.next_s(flat.nbytes), time.monotonic()
        calls = self._servers.begin("/update_weights_from_distributed", [body] * len(self._servers.members), limit_s=limit_s)
        # In the background: NCCL meets at the first broadcast, and would wait there without a limit for a server that never comes.
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the other thread's stream knows nothing of this one's
        started = in_background(partial(self._group.broadcast, flat), name="weight sync broadcast")
        try:
            self._wait_for(lambda: _is_over(started), calls, limit_s=limit_s, what="broadcasting weights")
            try:
                started.result().wait()
            except RuntimeError as error:
                self._servers.collect(calls)  # the server that made it fail says why
                raise ServerRefused(f"broadcasting weights: {error}") from error
            self._servers.collect(calls)
        except ServerRefused:
            self._group.close()  # at once: a server that waits for the broadcast answers nothing before the connection is gone
            raise
        limits.spend(time.monotonic() - began)

    def _wait_for(self, done: Callable[[], bool], calls: Sequence[Future[Any]], *, limit_s: float, what: str) -> None:
        """Wait for `done`, giving up as soon as a server's call has failed (it would be waited for in vain)."""
        deadline = time.monotonic() + limit_s
        pause_s = 0.0002
        while not done():
            self._servers.refuse_failed(calls)
            if time.monotonic() > deadline:
                raise ServerRefused(f"{what}: not done within {limit_s:.3g} s; no answer from {', '.join(self._servers.silent(calls))}")
            time.sleep(pause_s)
            pause_s = min(0.02, 2 * pause_s)


def _is_over(started: Future[dist.Work]) -> bool:
    return started.done() and (started.exception() is not None or started.result().is_completed())
