"""The files of waiting batches (batch/batch_file.py) in a checkpoint: a second name of each, so that nothing is written twice.

A checkpoint folder is complete by itself: it may be moved or copied with its run, and a batch that is trained later may drop its own name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_minpro.batch.folders import BATCH_FOLDERS
from megatron_minpro.batch.sample import RolloutBatch

_NO_LINKS = {
    errno.EPERM,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOSYS,
}  # of file systems that have none, or none across folders


def keep_files(run_dir: Path, checkpoint: Path, waiting: Iterable[RolloutBatch]) -> None:
    """Give the waiting batches' files names inside a checkpoint. run_dir: has them. Raises OSError."""
    for path in paths_of(waiting):
        _link(run_dir / path, checkpoint / path)


def restore_files(checkpoint: Path, run_dir: Path, waiting: Iterable[RolloutBatch]) -> None:
    """The counterpart: the run's folders then hold these files and no others. Raises OSError."""
    for folder in BATCH_FOLDERS:
        shutil.rmtree(run_dir / folder, ignore_errors=True)  # of batches that are sampled again
    for path in paths_of(waiting):
        _link(checkpoint / path, run_dir / path)


def paths_of(waiting: Iterable[RolloutBatch]) -> list[str]:
    """Of the files that the batches have, in the run folder."""
    return [path for batch in waiting for path in batch.files]


def _link(source: Path, destination: Path) -> None:
    destination.parent.mkdir(exist_ok=True)
    try:
        os.link(source, destination)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, destination)
