"""The weights of the servers, on rank 0's side: given to all at once, or kept until each server asks for them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from rollout.sglang.control import ServerRefused
from rollout.weights.checksums import check_equal, expected_checksums
from rollout.weights.keeper import WeightKeeper
from rollout.weights.weight_sync import WeightSync, WeightSyncFailed

log = logging.getLogger(__name__)

_KEPT = 2  # versions: the one that samples the batch before, and the newest

NamedTensors = Iterator[tuple[str, Tensor]]


class ServerWeights(Protocol):
    """What a run needs of either way."""

    @property
    def num_restarts(self) -> int:
        """Servers found with other weights than they were last given."""

    def publish(self, policy_version: int, tensors: NamedTensors) -> None:
        """From now on servers can sample under these weights. Raises WeightSyncFailed when no server took them."""

    def check(self, tensors: NamedTensors) -> None:
        """`tensors` are those of the latest publish: prove that servers hold them. Raises ChecksumMismatch."""

    def close(self) -> None: ...


class TogetherWeights:
    """All servers take new weights at the same time."""

    def __init__(self, weight_sync: WeightSync, *, dtype: torch.dtype, api_key: str | None, admin_key: str | None) -> None:
        """
        Args:
            weight_sync: the way to the servers.
            dtype: what they compute in.
            api_key, admin_key: theirs.
        """
        self._weight_sync = weight_sync
        self._dtype = dtype
        self._check_equal = partial(check_equal, api_key=api_key, admin_key=admin_key)
        self._published_to: tuple[str, ...] = ()

    @property
    def num_restarts(self) -> int:
        """See ServerWeights."""
        return self._weight_sync.num_restarts

    def publish(self, policy_version: int, tensors: NamedTensors) -> None:
        """See ServerWeights."""
        self._published_to = self._weight_sync.publish(policy_version, tensors)

    def check(self, tensors: NamedTensors) -> None:
        """See ServerWeights: every server that took the weights and still answers."""
        expected = expected_checksums(tensors, dtype=self._dtype)
        num_checked = 0
        for endpoint in self._published_to:
            try:
                self._check_equal(expected, endpoint)
            except ServerRefused as refused:
                if refused.status is not None:
                    raise
                log.warning("weights are not checked: %s", refused)
            else:
                num_checked += 1
        log.info("weights of %d server(s) equal the actor's: %d parameters", num_checked, len(expected))

    def close(self) -> None:
        """See ServerWeights."""
        self._weight_sync.close()


class RollingWeights:
    """Weights wait here until a server has finished what it samples under older ones, and is given them by `give`."""

    def __init__(self, keeper: WeightKeeper, *, dtype: torch.dtype, api_key: str | None, admin_key: str | None) -> None:
        """
        Args:
            keeper: holds the weights.
            dtype: what the servers compute in.
            api_key, admin_key: theirs.
        """
        self._keeper = keeper
        self._dtype = dtype
        self._check_equal = partial(check_equal, api_key=api_key, admin_key=admin_key)
        self._kept: list[int] = []  # policy versions, oldest first
        self._expected: dict[int, dict[str, str]] = {}  # policy version -> checksums, where they are to be checked

    @property
    def num_restarts(self) -> int:
        """See ServerWeights."""
        return self._keeper.num_restarts

    def publish(self, policy_version: int, tensors: NamedTensors) -> None:
        """Keep them. Older weights than the two newest versions are forgotten: the batch that they sampled is complete."""
        self._kept = [version for version in self._kept if version != policy_version] + [policy_version]
        while len(self._kept) > _KEPT:  # first, or three would need room at once
            version = self._kept.pop(0)
            self._keeper.forget(version)
            self._expected.pop(version, None)
        self._keeper.offer(policy_version, tensors)

    def check(self, tensors: NamedTensors) -> None:
        """Every server is checked when it is given them."""
        self._expected[self._kept[-1]] = expected_checksums(tensors, dtype=self._dtype)

    def give(self, endpoint: str, policy_version: int) -> None:
        """Put kept weights into one server. May be called in any thread.

        Raises:
            WeightSyncFailed: the server did not take them.
            ChecksumMismatch: it holds others now.
        """
        self._keeper.give(endpoint, policy_version)
        if (expected := self._expected.get(policy_version)) is not None:
            try:
                self._check_equal(expected, endpoint)
            except ServerRefused as refused:
                if refused.status is not None:
                    raise
                raise WeightSyncFailed(f"policy version {policy_version}: {refused}") from refused
            log.info("weights of %s equal the actor's: %d parameters", endpoint, len(expected))

    def close(self) -> None:
        """See ServerWeights."""
        self._keeper.close()
