"""Writes a run's checkpoints (run_state.py says what they are) while training goes on."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from checkpoints_convert.atomic_directory import fsync_path, fsync_tree, mount_point, write_file
from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.counters import RunCounters, UnfinishedStep
from megatron_minpro.run.background_write import BackgroundWrite, Trouble, agree, time_limit_s
from megatron_minpro.run.batch_files import keep_files, paths_of
from megatron_minpro.run.run_folder import LATEST_FILE, STATE_FILE
from megatron_minpro.run.run_state import (
    ACTOR_FOLDER,
    KEPT_FOLDER,
    WAITING_FILE,
    checkpoint_name,
    describe_model,
    file_sizes,
    join_batches,
)
from parallel.actor import MegatronActor

log = logging.getLogger(__name__)

_NAME = re.compile(r"^step_\d{6}(_update_\d{4}(_sampled)?)?$")


class CheckpointWriter:
    """One thread per rank writes, one checkpoint at a time. A failure keeps the checkpoints that are there.

    `save` and `wait` are collective: all ranks call them in the same order, and on failure all of them raise. No other thread than the
    writing one touches the file system, except to keep the files of waiting batches: one that does not answer holds up nobody.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run_dir: Path,
        keep: int,
        control_group: dist.ProcessGroup,
        saving_group: dist.ProcessGroup,
        limit_s: Callable[[int], float] = time_limit_s,
        before_rename: Callable[[], None] | None = None,
    ) -> None:
        """Collective.

        Args:
            directory: holds the checkpoints.
            run_dir: has the files of batches that wait, see batch/batch_file.py.
            keep: how many checkpoints stay, and beside them the one in which sampling ends. While one is written there is one more.
            control_group: gloo over all ranks.
            saving_group: gloo over all ranks, used by the writing threads alone.
            limit_s: from bytes of all ranks, how long a checkpoint may take.
            before_rename: rank 0's: writes what must lie beside a complete checkpoint. Its OSError is a failure of the checkpoint.
        """
        self._directory = directory
        self._run_dir = run_dir
        self._keep = keep
        self._control_group = control_group
        self._saving_group = saving_group
        self._limit_s = limit_s
        self._before_rename = before_rename
        self._first = dist.get_rank() == 0
        self.seconds: float | None = None  # of writing the newest complete checkpoint, from its beginning
        self._writing: BackgroundWrite | None = None
        self._missing: str | None = None  # why the state that was to be saved last is not on disk
        latest = directory / LATEST_FILE
        newest = [latest.read_text().strip() if self._first and latest.exists() else ""]
        dist.broadcast_object_list(newest, src=0, group=control_group)
        self._newest: str = newest[0]  # name of the newest complete checkpoint

    def save(
        self,
        *,
        actor: MegatronActor,
        config: RunConfig,
        counters: RunCounters,
        cursor: dict[str, Any] | None,
        waiting: Sequence[RolloutBatch],
        unfinished: UnfinishedStep | None = None,
    ) -> None:
        """Copy the state as it is now and begin to write it.

        cursor: rank 0's prompt cursor state (ignored elsewhere). unfinished: what is done of a global step that is under way.
        The new one appears by rename after all of it, from all ranks, is on disk. Nothing is written when the newest checkpoint is of this
        state already. Waits for the former checkpoint first; where that is not done within its time limit, this one is skipped with a
        warning. A disk that cannot take a checkpoint is a warning too; `wait` raises where no later one was written.
        Raises RuntimeError when the former one failed for another reason than the disk, ValueError for a waiting batch without behaviour
        log-probs.
        """
        for sample in (sample for batch in waiting for sample in batch.samples):
            if sample.behaviour_logprobs is None:
                raise ValueError(f"{sample.sample_id}: behaviour_logprobs are missing from a batch that waits")
        name = checkpoint_name(counters.next_step, unfinished)
        trouble = self._settle()
        if trouble is not None and trouble.kind == "stalled":
            self._missing = f"checkpoint {name} is skipped: {trouble.reason}"
            if self._first:
                log.warning("%s; training goes on", self._missing)
            return
        self._missing = None
        if self._newest == name:
            return
        start = time.monotonic()
        keeps = unfinished is not None and unfinished.batch == "missing"
        partial = self._directory / f".{name}.partial"
        files = paths_of(waiting)
        if files and (refused := self._keep_files(partial, waiting)) is not None:
            self._missing = f"checkpoint {name} was not written: {refused}"
            if self._first:
                log.warning("%s; training goes on until the next one", self._missing)
            return
        captured = {ACTOR_FOLDER: actor.capture(partial / ACTOR_FOLDER)}
        if keeps:
            captured[KEPT_FOLDER] = actor.capture_kept(partial / KEPT_FOLDER)
        state = {
            "config": config.model_dump(mode="json"),
            "counters": asdict(counters),
            "policy_version": actor.policy_version,
            "model": describe_model(actor.architecture),
            "cursor": copy.deepcopy(cursor),
            "unfinished": None if unfinished is None else asdict(unfinished),
            "kept_version": actor.kept_version if keeps else None,
        }
        batches = tuple(waiting)  # they never change
        num_bytes = self._sum(sum(part.num_bytes for part in captured.values()))
        end_of_sampling = f"step_{config.num_global_steps:06d}"

        def write() -> None:
            try:
                self._together(lambda: self._make_folders(partial, captured, keep_partial=bool(files)))
                self._together(lambda: _flush(partial, files))  # each rank may have written some of them
                for part in captured.values():
                    part.write(self._saving_group)  # returns when every rank's part is on disk
                if self._first:
                    self._finish(partial, name, state, batches)
                self.seconds = time.monotonic() - start
            except OSError as error:
                if not self._first:
                    raise
                shutil.rmtree(partial, ignore_errors=True)  # no rank writes any more
                reason = self._describe(name, error, num_bytes)
                log.warning("%s; training goes on until the next one", reason)
                raise OSError(reason) from error
            if self._first:
                self._delete_old(name, end_of_sampling)

        self._writing = BackgroundWrite(name, write, limit_s=self._limit_s(num_bytes))

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, within its time limit.

        Raises RuntimeError, on all ranks, when the state that was to be saved last is not on disk.
        """
        trouble = self._settle()
        if self._missing is not None:
            raise RuntimeError(self._missing)
        if trouble is not None:
            raise RuntimeError(trouble.reason)

    def join(self) -> None:
        """Wait until this rank writes nothing, within the time limit. Not collective: for a rank that is about to end."""
        if self._writing is not None:
            self._writing.trouble()

    def _settle(self) -> Trouble | None:
        """Collective. How writing ended; where it has not, in time, `_writing` stays. Raises RuntimeError for a fault of ours."""
        if self._writing is None:
            return None
        name, trouble = self._writing.name, agree(self._writing.trouble(), self._control_group)
        if trouble is not None and trouble.kind == "stalled":
            return trouble
        self._writing = None
        if trouble is None:
            self._newest = name
        elif trouble.kind == "fault":
            raise RuntimeError(f"checkpoint {name} was not written, the former ones are kept: {trouble.reason}")
        else:
            self._missing = trouble.reason
        return trouble

    def _sum(self, number: int) -> int:
        total = torch.tensor([number])
        dist.all_reduce(total, group=self._control_group)
        return int(total)

    def _together(self, action: Callable[[], object]) -> None:
        """Collective over the writing threads. Raises one rank's OSError on all ranks."""
        trouble: OSError | None = None
        try:
            action()
        except OSError as error:
            trouble = error
        found: list[Any] = [None] * dist.get_world_size(self._saving_group)
        dist.all_gather_object(found, trouble, group=self._saving_group)
        for rank, failure in enumerate(found):
            if failure is not None:
                raise OSError(f"rank {rank}: {failure}")

    def _make_folders(self, partial: Path, folders: Iterable[str], *, keep_partial: bool) -> None:
        """On rank 0. keep_partial: this checkpoint has begun already, see _keep_files."""
        if not self._first:
            return
        for unfinished in self._directory.glob(".step_*.partial"):
            if unfinished != partial or not keep_partial:
                shutil.rmtree(unfinished)
        for folder in folders:
            (partial / folder).mkdir(parents=True)

    def _keep_files(self, partial: Path, waiting: Sequence[RolloutBatch]) -> OSError | None:
        """Collective. Now, and not by the thread: a batch that is trained meanwhile drops its file."""
        trouble: list[OSError | None] = [None]
        if self._first:
            try:
                if partial.exists():
                    shutil.rmtree(partial)
                partial.mkdir(parents=True)  # the first one makes the folder around it
                keep_files(self._run_dir, partial, waiting)
            except OSError as error:
                trouble = [error]
        dist.broadcast_object_list(trouble, src=0, group=self._control_group)
        return trouble[0]

    def _describe(self, name: str, error: OSError, num_bytes: int) -> str:
        """What a person needs to know who is to make room."""
        former = f"{self._newest} stays the newest" if self._newest else "there is none yet"
        said = f"checkpoint {name} was not written, {former}: {' '.join(str(error).split())}"
        try:
            place = mount_point(self._directory)
            free = shutil.disk_usage(place).free
        except OSError:  # it has said enough
            return said
        kept = f"beside the {self._keep} that are kept (checkpoint.keep)"
        return f"{said}; it needs about {num_bytes:,} bytes {kept}, {free:,} are free on {place}"

    def _finish(self, partial: Path, name: str, state: dict[str, Any], waiting: Sequence[RolloutBatch]) -> None:
        records, tensors = join_batches(waiting)
        save_file(tensors, partial / WAITING_FILE)
        state = {**state, "waiting": records, "files": file_sizes(partial)}
        write_file(partial / STATE_FILE, json.dumps(state).encode())
        fsync_tree(partial)
        if self._before_rename is not None:
            self._before_rename()
        final = self._directory / name
        if final.exists():  # of an attempt that was killed before it moved `latest` here
            shutil.rmtree(final)
        os.rename(partial, final)
        write_atomically(self._directory / LATEST_FILE, name)

    def _delete_old(self, name: str, end_of_sampling: str) -> None:
        """Only now that the new one is complete."""
        complete = sorted(path for path in self._directory.iterdir() if _NAME.match(path.name) and path.name <= name)
        for old in complete[: -self._keep]:
            if old.name != end_of_sampling:  # a finished run is prolonged from there
                try:
                    shutil.rmtree(old)
                except OSError as error:
                    log.warning("checkpoint %s is complete, %s cannot be deleted: %s", name, old, error)


def _flush(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        fsync_path(folder / name)
