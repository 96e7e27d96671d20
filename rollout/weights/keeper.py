"""Weights of a few versions, kept by the trainer, from which any server can be given any of them at any time.

With a publish (weight_sync.py) all servers change their weights together. A keeper changes one server while the others go on under theirs:
its weights wait here, on disk or in host memory, until the server has finished what it samples under the old ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from rollout.weights.collective import CollectiveWeightSync
from rollout.weights.completeness import each_once
from rollout.weights.disk import DiskWeightSync, version_folders
from rollout.weights.weight_sync import NamedTensors

Weights = TypeVar("Weights")


@runtime_checkable
class WeightKeeper(Protocol):
    """`offer` and `forget` are called in one thread, `give` in any: at the same time for different servers."""

    @property
    def num_restarts(self) -> int:
        """Servers found, when they were given weights, with others than they were last given."""

    def offer(self, policy_version: int, tensors: NamedTensors) -> None:
        """Keep the named tensors (Hugging Face names, all of them, streamed) as weights of `policy_version`."""

    def give(self, endpoint: str, policy_version: int) -> None:
        """Put kept weights into one server, on which nothing is under way. Returns when it holds them and samples again.

        Raises WeightSyncFailed when it did not take them; it is then without a version, or gone. The same call can be made again.
        """

    def forget(self, policy_version: int) -> None:
        """Drop what `offer` kept."""

    def close(self) -> None: ...


class DiskKeeper:
    """One checkpoint folder per version, which servers and trainer both see."""

    def __init__(
        self, endpoints: Sequence[str], *, write_checkpoint: Callable[[Path, NamedTensors], None], directory: Path, **options: Any
    ) -> None:
        """
        Args:
            endpoints: base URLs.
            write_checkpoint, directory: as for DiskWeightSync. What is left there of an earlier attempt is deleted.
            options: of DiskWeightSync: api_key, admin_key, limits.
        """
        for folder in version_folders(directory):  # of an earlier attempt
            shutil.rmtree(folder)
        self._write_checkpoint = write_checkpoint
        self._directory = directory
        self._names: dict[int, frozenset[str]] = {}  # of the tensors, by version
        self._syncs = {
            endpoint.rstrip("/"): DiskWeightSync([endpoint], write_checkpoint=write_checkpoint, directory=directory, **options)
            for endpoint in endpoints
        }

    @property
    def num_restarts(self) -> int:
        """See WeightKeeper."""
        return sum(sync.num_restarts for sync in self._syncs.values())

    def offer(self, policy_version: int, tensors: NamedTensors) -> None:
        """See WeightKeeper. Raises ValueError when a tensor comes twice; OSError of the writing."""
        names: set[str] = set()
        self._write_checkpoint(self._folder(policy_version), each_once(tensors, names))
        self._names[policy_version] = frozenset(names)

    def give(self, endpoint: str, policy_version: int) -> None:
        """See WeightKeeper. Raises ValueError when tensors are missing."""
        self._syncs[endpoint].load(policy_version, self._folder(policy_version), kept(self._names, policy_version))

    def forget(self, policy_version: int) -> None:
        """See WeightKeeper."""
        if self._names.pop(policy_version, None) is not None:
            shutil.rmtree(self._folder(policy_version))

    def close(self) -> None:
        """Nothing is kept open."""

    def _folder(self, policy_version: int) -> Path:
        return self._directory / f"version_{policy_version}"


class CollectiveKeeper:
    """A copy of the tensors in host memory, and a process group with each server."""

    def __init__(self, endpoints: Sequence[str], **options: Any) -> None:
        """
        Args:
            endpoints: base URLs.
            options: of CollectiveWeightSync.
        """
        self._kept: dict[int, list[tuple[str, Tensor]]] = {}
        self._syncs = {endpoint.rstrip("/"): CollectiveWeightSync([endpoint], **options) for endpoint in endpoints}
        # A new thread begins on the first device, whichever this one works on.
        self._device = torch.cuda.current_device() if options.get("backend") == "nccl" else None

    @property
    def num_restarts(self) -> int:
        """See WeightKeeper."""
        return sum(sync.num_restarts for sync in self._syncs.values())

    def offer(self, policy_version: int, tensors: NamedTensors) -> None:
        """See WeightKeeper."""
        # Copies, on a CPU too: the trainer goes on to change its own.
        self._kept[policy_version] = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors]

    def give(self, endpoint: str, policy_version: int) -> None:
        """See WeightKeeper. Raises ValueError when tensors are missing or came twice."""
        tensors = kept(self._kept, policy_version)
        with _own_stream(self._device):
            self._syncs[endpoint].publish(policy_version, iter(tensors))

    def forget(self, policy_version: int) -> None:
        """See WeightKeeper."""
        self._kept.pop(policy_version, None)

    def close(self) -> None:
        """Leave all groups."""
        for sync in self._syncs.values():
            sync.close()


@contextmanager
def _own_stream(device: int | None) -> Iterator[None]:
    """The thread works on this CUDA device, and its copies do not stand in line with the trainer's kernels. None: there is no CUDA."""
    if device is None:
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield


def kept(by_version: Mapping[int, Weights], policy_version: int) -> Weights:
    """What is kept of a version. Raises RuntimeError, naming the versions that are kept, when it is none of them."""
    if policy_version not in by_version:
        raise RuntimeError(f"weights of policy version {policy_version} are wanted; kept are those of {sorted(by_version)}")
    return by_version[policy_version]
