"""Versioned weights from the actor into the servers: pause, update, version, continue, for all servers at once.

Two ways: collective.py, disk.py. server_set.py holds the servers, update.py the steps around the sending, completeness.py the names.

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

from collections.abc import Iterator
from typing import Literal, Protocol

from torch import Tensor

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
