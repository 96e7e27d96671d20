"""Versioned weights from the actor into the servers: pause, update, version, continue, for all servers at once.

What the servers go through, and what it protects:
    pause       nothing is sampled while weights are partly new
    begin       repacked or quantised layouts are opened for loading
    update      one or more buckets; the KV cache of the old weights is dropped
    end         layouts are closed, post-load work runs once
    version     all later tokens carry the new policy version
    check       every server reports the new version
    continue
If any step fails on any server, the servers stay paused, WeightSyncFailed is raised and the sync refuses further use: nobody can tell
which weights such a server holds, so none may be asked for a response. Restart the servers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rollout import sglang_control
from rollout.background import in_background
from rollout.broadcast_group import Backend, BroadcastGroup
from rollout.checksums import check_equal, expected_checksums, server_checksums, server_parameter, tensor_checksum
from rollout.sglang_control import ServerRefused, control_key

__all__ = [
    "CollectiveWeightSync",
    "DiskWeightSync",
    "WeightSync",
    "WeightSyncFailed",
    "check_equal",
    "expected_checksums",
    "server_checksums",
    "tensor_checksum",
]

NamedTensors = Iterator[tuple[str, Tensor]]
InFlight = Literal["retract", "abort"]


class WeightSyncFailed(RuntimeError):
    """Servers did not take the new weights; they are paused and must not be used. Names endpoint, step and reason."""


class WeightSync(Protocol):
    def publish(self, policy_version: int, tensors: NamedTensors) -> None:
        """Put the named tensors (Hugging Face names, all of them, streamed) into every server, as weights of `policy_version`."""

    def close(self) -> None: ...


class _Servers:
    """All servers, told the same thing at the same time.

    Endpoints that control a server take the admin key (the api key where no admin key is set), those that only tell about it the api key.
    """

    def __init__(self, endpoints: Sequence[str], *, api_key: str | None, admin_key: str | None, timeout_s: float) -> None:
        if not endpoints:
            raise ValueError("weight sync: no endpoints, expected at least one")
        self.endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self.api_key = api_key
        self.admin_key = control_key(api_key=api_key, admin_key=admin_key)
        self.timeout_s = timeout_s
        self.failure: str | None = None

    def begin(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[Future[Any]]:
        """Start one call per server, each with its own body."""
        return [
            in_background(
                partial(sglang_control.call, endpoint, path, body, key=self.admin_key, timeout_s=self.timeout_s), name=f"weight sync {path}"
            )
            for endpoint, body in zip(self.endpoints, bodies, strict=True)
        ]

    def tell(self, path: str, body: dict[str, Any]) -> None:
        """The same call to every server; returns when all have answered. Raises ServerRefused as soon as one did not, naming it."""
        self.collect(self.begin(path, [body] * len(self.endpoints)))

    def collect(self, calls: Sequence[Future[Any]]) -> None:
        done, _ = wait(calls, return_when=FIRST_EXCEPTION)  # one failure decides; a server that hangs is not waited for then
        errors = [str(call.exception()) for call in calls if call in done and call.exception() is not None]
        if errors:
            raise ServerRefused("; ".join(errors))

    def check_versions(self, expected: int) -> None:
        for endpoint in self.endpoints:
            found = sglang_control.weight_version(endpoint, key=self.api_key, timeout_s=self.timeout_s)
            if found != str(expected):
                raise ServerRefused(f"{endpoint}: reports weight version {found!r} after version {expected} was published")

    def parameter_names(self) -> set[str]:
        return set(server_checksums(self.endpoints[0], admin_key=self.admin_key, timeout_s=self.timeout_s)[0])


class _CompletenessCheck:
    """A server keeps its old values for every name that an update leaves out, and says nothing. This says it."""

    def __init__(self, servers: _Servers) -> None:
        self._servers = servers
        self._names: frozenset[str] | None = None

    def watch(self, tensors: NamedTensors) -> NamedTensors:
        """Passes tensors on; at the end, before any server is told to continue, checks that none was missing or came twice."""
        seen: set[str] = set()
        for name, tensor in tensors:
            if name in seen:
                raise ValueError(f"weight sync: tensor {name} came twice")
            seen.add(name)
            yield name, tensor
        if self._names is None:
            self._check_against_server(seen)
            self._names = frozenset(seen)
        elif seen != self._names:
            missing, extra = sorted(self._names - seen), sorted(seen - self._names)
            raise ValueError(f"weight sync: tensors differ from the first publish; missing: {missing[:5]}; new: {extra[:5]}")

    def _check_against_server(self, seen: set[str]) -> None:
        held = self._servers.parameter_names()
        sent = {server_parameter(name)[0] for name in seen}
        missing = sorted(held - sent)
        unknown = sorted(sent - held - {"lm_head.weight"})  # tied to the embedding, the server lists it once
        if missing or unknown:
            raise ValueError(f"weight sync: never sent to the server: {missing[:5]}; not in the server: {unknown[:5]}")


class DiskWeightSync:
    """Through a checkpoint folder that servers and trainer both see. Simple and slow; any layout, any number of hosts with one file system.

    write_checkpoint(directory, tensors): writes a whole Hugging Face folder (config.json too), streaming. directory: gets one folder per
    version; the folder of the version before is removed once the new one is in use.
    in_flight: what becomes of responses being generated: "retract" continues them under the new weights (their version spans say so),
    "abort" ends them (the client samples them again).
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        write_checkpoint: Callable[[Path, NamedTensors], None],
        directory: Path,
        api_key: str | None = None,
        admin_key: str | None = None,
        in_flight: InFlight = "retract",
        timeout_s: float = 600.0,
    ) -> None:
        self._servers = _Servers(endpoints, api_key=api_key, admin_key=admin_key, timeout_s=timeout_s)
        self._complete = _CompletenessCheck(self._servers)
        self._write_checkpoint = write_checkpoint
        self._directory = Path(directory)
        self._in_flight = in_flight

    def publish(self, policy_version: int, tensors: NamedTensors) -> None:
        """Write the checkpoint, then load it everywhere. The servers keep sampling while it is written.

        Raises WeightSyncFailed when a server does not take it, ValueError when tensors are missing; OSError of the writing.
        """
        folder = self._directory / f"version_{policy_version}"
        _refuse_if_failed(self._servers)
        self._write_checkpoint(folder, self._complete.watch(tensors))
        with _Update(self._servers, policy_version, self._in_flight) as update:
            update.step("/update_weights_from_disk", {"model_path": str(folder.resolve()), "flush_cache": True})
        self._remove_all_but(folder)

    def close(self) -> None:
        """Nothing is kept open."""

    def _remove_all_but(self, kept: Path) -> None:
        for folder in self._directory.glob("version_*"):
            if folder != kept:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()


class CollectiveWeightSync:
    """Broadcast from this process (rank 0 of the trainer) into the servers' memory: gloo between CPUs, NCCL between GPUs.

    tp: of each server. master_address: this host as the servers reach it. bucket_bytes: tensors travel in flat buckets of about this
    size (a larger tensor alone makes its own); memory needed on both sides: one bucket.
    in_flight: as for DiskWeightSync. timeout_s: of joining, and of each step of an update.
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
        timeout_s: float = 600.0,
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"weight sync: bucket_bytes is {bucket_bytes}, expected at least 1")
        self._servers = _Servers(endpoints, api_key=api_key, admin_key=admin_key, timeout_s=timeout_s)
        self._complete = _CompletenessCheck(self._servers)
        self._bucket_bytes = bucket_bytes
        self._in_flight = in_flight
        self._timeout_s = timeout_s
        # A name of its own per connection: a server refuses nothing about an old group of the same name, it would silently use it.
        self._group = BroadcastGroup(
            name=f"weight_sync_{uuid.uuid4().hex[:12]}",
            world_size=1 + tp * len(self._servers.endpoints),
            backend=backend,
            master_address=master_address,
            timeout_s=timeout_s,
        )
        self._join(tp)

    def publish(self, policy_version: int, tensors: NamedTensors) -> None:
        """Send the tensors bucket by bucket. The servers pause when the first bucket is full, and continue when the last is loaded.

        Raises WeightSyncFailed when a server does not take them or when `tensors` fails or is incomplete after the pause.
        """
        _refuse_if_failed(self._servers)
        buckets = fill_buckets(self._complete.watch(tensors), bucket_bytes=self._bucket_bytes)
        first = next(buckets, None)
        if first is None:
            raise ValueError("weight sync: no tensors were given")
        with _Update(self._servers, policy_version, self._in_flight) as update:
            update.step("/begin_weight_update", {})
            bucket: list[tuple[str, Tensor]] | None = first
            while bucket is not None:
                self._send(bucket)
                bucket = next(buckets, None)
            update.step("/end_weight_update", {})

    def close(self) -> None:
        """Leave the group; servers that are still alive leave it too."""
        if self._servers.failure is None:
            try:
                self._servers.tell("/destroy_weights_update_group", {"group_name": self._group.name})
            except ServerRefused as refused:  # a server that is gone has left the group as well
                self._servers.failure = str(refused)
        self._group.close()

    def _join(self, tp: int) -> None:
        bodies = [
            {
                "master_address": self._group.master_address,
                "master_port": self._group.port,
                "rank_offset": 1 + index * tp,
                "world_size": self._group.world_size,
                "group_name": self._group.name,
                "backend": self._group.backend,
            }
            for index in range(len(self._servers.endpoints))
        ]
        calls = self._servers.begin("/init_weights_update_group", bodies)
        # In the background: where a server refuses, joining would only end with the time limit, and nobody waits for that.
        joined = in_background(self._group.join, name="weight sync join")
        try:
            _wait_for(joined.done, calls, deadline=time.monotonic() + self._timeout_s, what="joining the weight sync group")
            joined.result()
            self._servers.collect(calls)
        except (ServerRefused, RuntimeError) as error:
            self._servers.failure = str(error)
            raise WeightSyncFailed(f"cannot join the weight sync group: {error}") from error

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
        flat = torch.cat([tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in bucket]).to(self._group.device)
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": self._group.name,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        calls = self._servers.begin("/update_weights_from_distributed", [body] * len(self._servers.endpoints))
        work = self._group.broadcast(flat)
        _wait_for(work.is_completed, calls, deadline=time.monotonic() + self._timeout_s, what="broadcasting weights")
        work.wait()  # raises if the broadcast failed
        self._servers.collect(calls)


def fill_buckets(tensors: NamedTensors, *, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group streamed tensors into buckets of at most `bucket_bytes` (or one larger tensor). Deterministic.

    Within a bucket, wider dtypes come first: laid out end to end, every tensor then starts at a multiple of its item size.
    """
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield sorted(bucket, key=lambda item: -item[1].itemsize)
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield sorted(bucket, key=lambda item: -item[1].itemsize)


class _Update:
    """Pause on entry; version, check and continue on a clean exit; on any failure the servers stay paused and are marked as unusable."""

    def __init__(self, servers: _Servers, policy_version: int, in_flight: InFlight) -> None:
        self._servers = servers
        self._policy_version = policy_version
        self._in_flight = in_flight

    def __enter__(self) -> _Update:
        try:
            self.step("/pause_generation", {"mode": self._in_flight})
        except BaseException as error:
            self._fail(error)
        return self

    def step(self, path: str, body: dict[str, Any]) -> None:
        self._servers.tell(path, body)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._fail(error)
        try:
            # Without aborting: by default this call would end every response in flight.
            self.step("/update_weight_version", {"new_version": str(self._policy_version), "abort_all_requests": False})
            self._servers.check_versions(self._policy_version)
            self.step("/continue_generation", {})
        except BaseException as late:
            self._fail(late)

    def _fail(self, error: BaseException) -> None:
        self._servers.failure = f"policy version {self._policy_version}: {error}"
        if not isinstance(error, Exception):
            raise error
        raise WeightSyncFailed(
            f"policy version {self._policy_version} is not in all servers, which stay paused and must be restarted: {error}"
        ) from error


def _refuse_if_failed(servers: _Servers) -> None:
    if servers.failure is not None:
        raise WeightSyncFailed(f"the servers hold unknown weights since an earlier failure: {servers.failure}")


def _wait_for(done: Callable[[], bool], calls: Sequence[Future[Any]], *, deadline: float, what: str) -> None:
    """Wait for `done`, giving up as soon as a server's call has failed (it would be waited for in vain)."""
    pause_s = 0.0002
    while not done():
        errors = [call.exception() for call in calls if call.done() and call.exception() is not None]
        if errors:
            raise ServerRefused(f"{what}: {'; '.join(str(error) for error in errors)}")
        if time.monotonic() > deadline:
            raise ServerRefused(f"{what}: not done within the time limit")
        time.sleep(pause_s)
        pause_s = min(0.02, 2 * pause_s)
