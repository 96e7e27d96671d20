"""Versioned weights from the actor into the servers: pause, update, version, continue, for all servers at once.

What the servers go through, and what it protects:
    pause       nothing is sampled while weights are partly new
    no version  a server with partly new weights reports a version that no client asks for
    begin       repacked or quantised layouts are opened for loading
    update      one or more buckets; the KV cache of the old weights is dropped
    end         layouts are closed, post-load work runs once
    version     all later tokens carry the new policy version
    check       every server reports the new version
    continue
A publish goes to the servers that answer. If any step fails on any of them, the publish has failed: all stay paused and without a
version, so that no client asks them, and WeightSyncFailed is raised. The same version can then be published again. It goes to the servers
that answer, without those on which it failed (unless there are no others), and overwrites every weight. The next version goes to all.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.background import in_background
from rollout.sglang import control as sglang_control
from rollout.sglang.control import ServerRefused, control_key
from rollout.weights.broadcast_group import Backend, BroadcastGroup
from rollout.weights.buckets import fill_buckets
from rollout.weights.checksums import check_equal, expected_checksums, server_checksums, server_parameter, tensor_checksum

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

log = logging.getLogger(__name__)

_QUICK_S = 30.0  # for what loads nothing

NamedTensors = Iterator[tuple[str, Tensor]]
InFlight = Literal["retract", "abort"]


class WeightSyncFailed(RuntimeError):
    """No server took the new weights; those that were asked are paused and have no version. Names endpoint, step and reason.

    The weights can be published again.
    """


class WeightSync(Protocol):
    @property
    def num_restarts(self) -> int:
        """Servers found, at a publish, with other weights than they were last given."""

    def publish(self, policy_version: int, tensors: NamedTensors) -> tuple[str, ...]:
        """Put the named tensors (Hugging Face names, all of them, streamed) into the servers, as weights of `policy_version`.

        The endpoints that hold them now: all that answer, or (WeightSyncFailed) none; the tensors may then not be used up.
        """

    def close(self) -> None: ...


class _Servers:
    """All servers, and those among them that take part in the present publish; these are told the same thing at the same time.

    Endpoints that control a server take the admin key (the api key where no admin key is set), those that only tell about it the api key.
    """

    def __init__(self, endpoints: Sequence[str], *, api_key: str | None, admin_key: str | None, timeout_s: float) -> None:
        if not endpoints:
            raise ValueError("weight sync: no endpoints, expected at least one")
        self.endpoints = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        self.members: tuple[str, ...] = ()
        self.api_key = api_key
        self.admin_key = control_key(api_key=api_key, admin_key=admin_key)
        self.timeout_s = timeout_s
        self.num_restarts = 0
        self._expected: dict[str, set[str]] = {}  # what each server reports unless it was restarted; after a failed publish one of several
        self._failed: tuple[int, set[str]] = (-1, set())  # a policy version, and the servers on which its publish failed

    def gather(self, policy_version: int) -> bool:
        """Choose the members of a publish. True when they are those of the last one and hold what it gave them.

        Raises WeightSyncFailed when no server answers.
        """
        asked = [in_background(partial(self._look, endpoint), name="weight sync look") for endpoint in self.endpoints]
        wait(asked)
        reasons = {e: call.exception() for e, call in zip(self.endpoints, asked, strict=True) if call.exception() is not None}
        found = {e: call.result() for e, call in zip(self.endpoints, asked, strict=True) if e not in reasons}
        for endpoint, reason in reasons.items():
            log.warning("weight version %d is published without %s: %s", policy_version, endpoint, reason)
        if not found:
            raise WeightSyncFailed(f"policy version {policy_version}: no server answers: {'; '.join(map(str, reasons.values()))}")
        if self._failed[0] != policy_version:
            self._failed = (policy_version, set())
        restarted = {e: version for e, version in found.items() if version not in self._expected.setdefault(e, {version})}
        for endpoint, version in restarted.items():
            log.warning("%s was restarted: it holds weight version %r, not %s", endpoint, version, sorted(self._expected[endpoint]))
            self._expected[endpoint] = {version}
        self.num_restarts += len(restarted)
        before, self.members = self.members, tuple(e for e in found if e not in self._failed[1]) or tuple(found)
        return before == self.members and not restarted and all(len(self._expected[endpoint]) == 1 for endpoint in self.members)

    def may_hold(self, *versions: str) -> None:
        """From now on the members hold what they held or one of these versions."""
        for endpoint in self.members:
            self._expected[endpoint].update(versions)

    def hold(self, version: str) -> None:
        """The members hold this version."""
        self._expected |= {endpoint: {version} for endpoint in self.members}

    def _look(self, endpoint: str) -> str:
        # One that cannot compute would make everybody wait for it in the group.
        sglang_control.check_engine(endpoint, key=self.api_key, timeout_s=min(_QUICK_S, self.timeout_s))
        return self._version(endpoint)

    def _version(self, endpoint: str) -> str:
        return sglang_control.weight_version(endpoint, key=self.api_key, timeout_s=min(_QUICK_S, self.timeout_s))

    def begin(self, path: str, bodies: Sequence[dict[str, Any]], *, timeout_s: float | None = None) -> list[Future[Any]]:
        """Start one call per member, each with its own body."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        return [
            in_background(
                partial(sglang_control.call, endpoint, path, body, key=self.admin_key, timeout_s=limit_s), name=f"weight sync {path}"
            )
            for endpoint, body in zip(self.members, bodies, strict=True)
        ]

    def tell(self, path: str, body: dict[str, Any]) -> None:
        """The same call to every member; returns when all have answered. Raises ServerRefused as soon as one did not, naming it."""
        self.collect(self.begin(path, [body] * len(self.members)))

    def tell_quickly(self, path: str, body: dict[str, Any]) -> None:
        """`tell` for what loads nothing: an answer that takes longer than seconds never comes."""
        self.collect(self.begin(path, [body] * len(self.members), timeout_s=min(_QUICK_S, self.timeout_s)))

    def tell_all(self, path: str, body: dict[str, Any]) -> None:
        """`tell_quickly`, but waits for every server's answer before it returns or raises."""
        calls = self.begin(path, [body] * len(self.members), timeout_s=min(_QUICK_S, self.timeout_s))
        wait(calls)
        self.refuse_failed(calls)

    def try_to_tell(self, path: str, body: dict[str, Any]) -> None:
        """The same call to every member, whatever they answer, if they do so within seconds."""
        wait(self.begin(path, [body] * len(self.members), timeout_s=min(_QUICK_S, self.timeout_s)))

    def collect(self, calls: Sequence[Future[Any]]) -> None:
        """Wait for the answers to `begin`; one failure decides, and a server that hangs is not waited for then."""
        wait(calls, return_when=FIRST_EXCEPTION)
        self.refuse_failed(calls)

    def refuse_failed(self, calls: Sequence[Future[Any]]) -> None:
        """Raises ServerRefused when a call to a member has failed by now."""
        failed = {e: call.exception() for e, call in zip(self.members, calls, strict=True) if call.done() and call.exception() is not None}
        if failed:
            self._failed[1].update(failed)
            raise ServerRefused("; ".join(str(error) for error in failed.values()))

    def check_versions(self, expected: int) -> None:
        for endpoint in self.members:
            if (found := self._version(endpoint)) != str(expected):
                raise ServerRefused(f"{endpoint}: reports weight version {found!r} after version {expected} was published")

    def parameter_names(self) -> set[str]:
        return set(server_checksums(self.members[0], admin_key=self.admin_key, timeout_s=self.timeout_s)[0])


def each_once(tensors: NamedTensors, seen: set[str]) -> NamedTensors:
    """Passes tensors on and adds their names to `seen`. Raises ValueError when one comes twice."""
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"weight sync: tensor {name} came twice")
        seen.add(name)
        yield name, tensor


class _CompletenessCheck:
    """A server keeps its old values for every name that an update leaves out, and says nothing. This says it."""

    def __init__(self, servers: _Servers) -> None:
        self._servers = servers
        self._names: frozenset[str] | None = None

    def watch(self, tensors: NamedTensors) -> NamedTensors:
        """Passes tensors on; at the end, before any server is told to continue, checks that none was missing or came twice."""
        seen: set[str] = set()
        yield from each_once(tensors, seen)
        self.check(seen)

    def check(self, names: Set[str]) -> None:
        """Raises ValueError unless these are the server's parameters, at the first time, and the same names as then, later."""
        if self._names is None:
            self._check_against_server(names)
            self._names = frozenset(names)
        elif names != self._names:
            missing, extra = sorted(self._names - names), sorted(names - self._names)
            raise ValueError(f"weight sync: tensors differ from the first publish; missing: {missing[:5]}; new: {extra[:5]}")

    def _check_against_server(self, names: Set[str]) -> None:
        try:
            held = self._servers.parameter_names()
        except ServerRefused as refused:
            raise WeightSyncFailed(f"cannot learn which parameters a server has: {refused}") from refused
        sent = {server_parameter(name)[0] for name in names}
        missing = sorted(held - sent)
        unknown = sorted(sent - held - {"lm_head.weight"})  # tied to the embedding, the server lists it once
        if missing or unknown:
            raise ValueError(f"weight sync: never sent to the server: {missing[:5]}; not in the server: {unknown[:5]}")


def version_folders(directory: Path) -> list[Path]:
    """All folders of weights, those included that a killed attempt began to write."""
    return [*directory.glob("version_*"), *directory.glob(".version_*")]


class DiskWeightSync:
    """Through a checkpoint folder that servers and trainer both see. Simple and slow; any layout, any number of hosts with one file system.

    write_checkpoint(directory, tensors): writes a whole Hugging Face folder (config.json too), streaming. directory: gets one folder per
    version; older folders are removed once the new one is in use.
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

    @property
    def num_restarts(self) -> int:
        return self._servers.num_restarts

    def publish(self, policy_version: int, tensors: NamedTensors) -> tuple[str, ...]:
        """Write the checkpoint, then load it everywhere. The servers keep sampling while it is written.

        Raises WeightSyncFailed when no server took it, ValueError when tensors are missing; OSError of the writing.
        """
        folder = self._directory / f"version_{policy_version}"
        self._servers.gather(policy_version)
        names: set[str] = set()
        self._write_checkpoint(folder, each_once(tensors, names))
        members = self.load(policy_version, folder, names)
        self._remove_all_but(folder)
        return members

    def load(self, policy_version: int, folder: Path, names: Set[str]) -> tuple[str, ...]:
        """Load a checkpoint that is written already.

        Args:
            policy_version: of its weights.
            folder: what `write_checkpoint` wrote.
            names: of its tensors.

        Raises:
            WeightSyncFailed: no server took it.
            ValueError: tensors are missing.
        """
        self._servers.gather(policy_version)  # after the writing, which may have taken minutes
        self._complete.check(names)
        with _update(self._servers, policy_version, self._in_flight):
            self._servers.tell("/update_weights_from_disk", {"model_path": str(folder.resolve()), "flush_cache": True})
        return self._servers.members

    def close(self) -> None:
        """Nothing is kept open."""

    def _remove_all_but(self, kept: Path) -> None:
        for folder in version_folders(self._directory):
            if folder != kept:
                shutil.rmtree(folder)


class CollectiveWeightSync:
    """Broadcast from this process (rank 0 of the trainer) into the servers' memory: gloo between CPUs, NCCL between GPUs.

    tp: of each server. master_address: this host as the servers reach it. bucket_bytes: tensors travel in flat buckets of about this
    size (a larger tensor alone makes its own); memory needed on both sides: one bucket.
    in_flight: as for DiskWeightSync. timeout_s: of joining, and of each step of an update.
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
        timeout_s: float = 600.0,
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"weight sync: bucket_bytes is {bucket_bytes}, expected at least 1")
        self._servers = _Servers(endpoints, api_key=api_key, admin_key=admin_key, timeout_s=timeout_s)
        self._complete = _CompletenessCheck(self._servers)
        self._tp = tp
        self._backend: Backend = backend
        self._master_address = master_address
        self._bucket_bytes = bucket_bytes
        self._in_flight = in_flight
        self._timeout_s = timeout_s
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
            with _update(self._servers, policy_version, self._in_flight):
                self._servers.tell_quickly("/begin_weight_update", {})
                bucket: list[tuple[str, Tensor]] | None = first
                while bucket is not None:
                    self._send(bucket)
                    bucket = next(buckets, None)
                self._servers.tell("/end_weight_update", {})
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
        # First this end: a server that waits for a broadcast answers nothing else until the connection is gone.
        self._group.close()
        self._servers.try_to_tell("/destroy_weights_update_group", {"group_name": self._group.name})
        self._group = None

    def _join(self, policy_version: int) -> None:
        members = self._servers.members
        self._group = BroadcastGroup(
            # A name of its own: a server refuses nothing about an old group of the same name, it would silently use it.
            name=f"weight_sync_{uuid.uuid4().hex[:12]}",
            world_size=1 + self._tp * len(members),
            backend=self._backend,
            master_address=self._master_address,
            timeout_s=self._timeout_s,
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
        calls = self._servers.begin("/init_weights_update_group", bodies)
        # In the background: where a server refuses, joining would end only at the time limit, so it runs in a thread.
        joined = in_background(self._group.join, name="weight sync join")
        try:
            self._wait_for(joined.done, calls, what="joining the weight sync group")
            try:
                joined.result()
            except RuntimeError as error:
                raise ServerRefused(f"joining the weight sync group: {error}") from error
            self._servers.collect(calls)
        except ServerRefused as error:
            self._leave()
            raise WeightSyncFailed(f"policy version {policy_version}: cannot join the weight sync group: {error}") from error

    def _send(self, bucket: list[tuple[str, Tensor]]) -> None:
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
        calls = self._servers.begin("/update_weights_from_distributed", [body] * len(self._servers.members))
        # In the background: NCCL meets at the first broadcast, and would wait there without a limit for a server that never comes.
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # the other thread's stream knows nothing of this one's
        started = in_background(partial(self._group.broadcast, flat), name="weight sync broadcast")
        self._wait_for(lambda: _is_over(started), calls, what="broadcasting weights")
        try:
            started.result().wait()
        except RuntimeError as error:
            self._servers.collect(calls)  # the server that made it fail says why
            raise ServerRefused(f"broadcasting weights: {error}") from error
        self._servers.collect(calls)

    def _wait_for(self, done: Callable[[], bool], calls: Sequence[Future[Any]], *, what: str) -> None:
        """Wait for `done`, giving up as soon as a server's call has failed (it would be waited for in vain)."""
        deadline = time.monotonic() + self._timeout_s
        pause_s = 0.0002
        while not done():
            self._servers.refuse_failed(calls)
            if time.monotonic() > deadline:
                raise ServerRefused(f"{what}: not done within {self._timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(0.02, 2 * pause_s)


def _is_over(started: Future[dist.Work]) -> bool:
    return started.done() and (started.exception() is not None or started.result().is_completed())


@contextmanager
def _update(servers: _Servers, policy_version: int, in_flight: InFlight) -> Iterator[None]:
    """Pause before the update, set the version and continue after it. On failure members stay paused, with a version no client asks for."""
    unusable = f"{uuid.uuid4().hex[:8]} of an unfinished update to {policy_version}"
    try:
        servers.may_hold(unusable, str(policy_version))
        servers.tell_quickly("/pause_generation", {"mode": in_flight})
        # Without aborting: by default this call would end every response in flight.
        servers.tell_quickly("/update_weight_version", {"new_version": unusable, "abort_all_requests": False})
        yield
        servers.tell_all("/update_weight_version", {"new_version": str(policy_version), "abort_all_requests": False})
        servers.check_versions(policy_version)
        servers.tell_quickly("/continue_generation", {})
        servers.hold(str(policy_version))
    except ServerRefused as refused:
        # Those that have taken the version already are paused as well: a client that asked them would never get an answer.
        servers.try_to_tell("/update_weight_version", {"new_version": unusable, "abort_all_requests": False})
        raise WeightSyncFailed(f"policy version {policy_version}: no server took it: {refused}") from refused
