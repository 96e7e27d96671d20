"""The experts of waiting batches (batch/routing_file.py) in a checkpoint: a second name of the file, so that nothing is written twice.

A checkpoint folder is complete by itself: it may be moved or copied with its run, and a batch that is trained later may drop its own name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_minpro.batch.routing_folder import ROUTING_FOLDER
from megatron_minpro.batch.sample import RolloutBatch

_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOSYS,
}  # of file systems that have none, or none across folders


def keep_experts(routing: Path, checkpoint: Path, waiting: Iterable[RolloutBatch]) -> None:
    """Give the waiting batches' files names inside a checkpoint. routing: the run's folder of them. Raises OSError."""
    for name in routing_names(waiting):
        (checkpoint / ROUTING_FOLDER).mkdir(exist_ok=True)
        _link(routing / name, checkpoint / ROUTING_FOLDER / name)


def restore_experts(checkpoint: Path, routing: Path, waiting: Iterable[RolloutBatch]) -> None:
    """The counterpart: the run's folder then holds these files and no others. Raises OSError."""
    shutil.rmtree(routing, ignore_errors=True)  # of batches that are sampled again
    for name in routing_names(waiting):
        routing.mkdir(exist_ok=True)
        _link(checkpoint / ROUTING_FOLDER / name, routing / name)


def routing_names(waiting: Iterable[RolloutBatch]) -> list[str]:
    """Of the files that the batches have."""
    return [batch.routing.name for batch in waiting if batch.routing is not None]


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, destination)
