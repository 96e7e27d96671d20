"""Weights through a checkpoint folder that servers and trainer both see."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence, Set
from pathlib import Path

from rollout.weights.completeness import CompletenessCheck, each_once
from rollout.weights.server_set import ServerSet
from rollout.weights.time_limits import WeightTimeLimits
from rollout.weights.update import update
from rollout.weights.weight_sync import InFlight, NamedTensors


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
        limits: WeightTimeLimits | None = None,
    ) -> None:
        self._servers = ServerSet(endpoints, api_key=api_key, admin_key=admin_key, limits=limits or WeightTimeLimits())
        self._complete = CompletenessCheck(self._servers)
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
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self._complete.check(names, num_bytes=num_bytes)
        body, limit_s = {"model_path": str(folder.resolve()), "flush_cache": True}, self._servers.limits.moving(num_bytes)
        with update(self._servers, policy_version, self._in_flight):
            self._servers.tell("/update_weights_from_disk", body, limit_s=limit_s)
        return self._servers.members

    def close(self) -> None:
        """Nothing is kept open."""

    def _remove_all_but(self, kept: Path) -> None:
        for folder in version_folders(self._directory):
            if folder != kept:
                shutil.rmtree(folder)
