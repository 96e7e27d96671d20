"""Writes a run's checkpoints (run_state.py says what they are) while training goes on."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file

from checkpoints_convert.atomic_directory import fsync_path, fsync_tree
from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.batch.routing_file import ROUTING_FOLDER
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.counters import RunCounters, UnfinishedStep
from megatron_minpro.run.routing_links import keep_experts, routing_names
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

    `save` and `wait` are collective: all ranks call them in the same order, and on failure all of them raise.
    """

    def __init__(
        self, directory: Path, *, routing: Path, keep: int, control_group: dist.ProcessGroup, saving_group: dist.ProcessGroup
    ) -> None:
        """
        Args:
            directory: holds the checkpoints.
            routing: holds the experts of batches that wait, see batch/routing_file.py.
            keep: how many checkpoints stay, and beside them the one in which sampling ends.
            control_group: gloo over all ranks.
            saving_group: gloo over all ranks, used by the writing threads alone.
        """
        self._directory = directory
        self._routing = routing
        self._keep = keep
        self._control_group = control_group
        self._saving_group = saving_group
        self._first = dist.get_rank() == 0
        self._thread: Thread | None = None
        self._failure: str | None = None
        self.seconds: float | None = None  # of writing the newest complete checkpoint, from its beginning

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
        Waits for the former checkpoint first. The new one appears by rename after all of it, from all ranks, is on disk. Nothing is
        written when the newest checkpoint is of this state already. Raises RuntimeError when the former one failed, OSError when there
        is no room to begin, ValueError for a waiting batch without behaviour log-probs.
        """
        self.wait()
        start = time.monotonic()
        for sample in (sample for batch in waiting for sample in batch.samples):
            if sample.behaviour_logprobs is None:
                raise ValueError(f"{sample.sample_id}: behaviour_logprobs are missing from a batch that waits")
        name = checkpoint_name(counters.next_step, unfinished)
        keeps = unfinished is not None and unfinished.batch == "missing"
        partial = self._directory / f".{name}.partial"
        folders = [ACTOR_FOLDER, KEPT_FOLDER] if keeps else [ACTOR_FOLDER]
        if not self._on_first_rank(lambda: self._make_room(name, partial, folders=folders, waiting=waiting)):
            return
        writers = [actor.capture(partial / ACTOR_FOLDER)]
        if keeps:
            writers.append(actor.capture_kept(partial / KEPT_FOLDER))
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

        def write() -> None:
            try:
                for file in routing_names(batches):
                    fsync_path(partial / ROUTING_FOLDER / file)  # on every rank: each may have written some of it
                for write_part in writers:
                    write_part(self._saving_group)  # returns when every rank's part is on disk
                if self._first:
                    self._finish(partial, name, state, batches, end_of_sampling=f"step_{config.num_global_steps:06d}")
                self.seconds = time.monotonic() - start
            except BaseException as error:  # without this the error would be lost
                self._failure = (
                    f"checkpoint {name} was not written, the former ones are kept: {type(error).__name__}: {' '.join(str(error).split())}"
                )
                log.error(self._failure)

        self._thread = Thread(target=write, name=f"checkpoint {name}", daemon=True)
        self._thread.start()

    def failure(self) -> str | None:
        """Why writing failed on this rank, as soon as that is known; None while all is well. Not collective, does not wait."""
        return self._failure

    def join(self) -> None:
        """Wait until this rank writes nothing. Not collective: for a rank that is about to end because of an error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete. Raises RuntimeError when writing failed."""
        self.join()
        failures: list[Any] = [self._failure]
        dist.broadcast_object_list(failures, src=0, group=self._control_group)  # one rank's failure is every rank's, see write
        if failures[0] is not None or self._failure is not None:
            raise RuntimeError(failures[0] or self._failure)

    def _on_first_rank(self, action: Callable[[], bool]) -> bool:
        """What the action says on rank 0, on all ranks; its OSError is raised on all of them."""
        outcome: list[Any] = [None]
        if self._first:
            try:
                outcome = [action()]
            except OSError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._control_group)
        if isinstance(outcome[0], OSError):
            raise outcome[0]
        return outcome[0]

    def _make_room(self, name: str, partial: Path, *, folders: Sequence[str], waiting: Sequence[RolloutBatch]) -> bool:
        latest = self._directory / LATEST_FILE
        if latest.exists() and latest.read_text().strip() == name:
            return False
        for unfinished in self._directory.glob(".step_*.partial"):
            shutil.rmtree(unfinished)
        for folder in folders:
            (partial / folder).mkdir(parents=True)
        keep_experts(self._routing, partial, waiting)  # now: a batch that is trained meanwhile drops its file
        return True

    def _finish(self, partial: Path, name: str, state: dict[str, Any], waiting: Sequence[RolloutBatch], *, end_of_sampling: str) -> None:
        records, tensors = join_batches(waiting)
        save_file(tensors, partial / WAITING_FILE)
        state = {**state, "waiting": records, "files": file_sizes(partial)}
        (partial / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        fsync_tree(partial)
        final = self._directory / name
        if final.exists():  # of an attempt that was killed before it moved `latest` here
            shutil.rmtree(final)
        os.rename(partial, final)
        write_atomically(self._directory / LATEST_FILE, name)
        complete = sorted(path for path in self._directory.iterdir() if _NAME.match(path.name) and path.name <= name)
        for old in complete[: -self._keep]:
            if old.name != end_of_sampling:  # a finished run is prolonged from there
                shutil.rmtree(old)
