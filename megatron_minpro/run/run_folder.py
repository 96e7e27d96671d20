"""Names inside a run folder that several processes agree on."""

from __future__ import annotations

import shutil
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.batch.folders import BATCH_FOLDERS
from megatron_minpro.tracking.metrics_file import METRICS_FILE
from megatron_minpro.tracking.rollout_log import ROLLOUTS_FOLDER
from megatron_minpro.tracking.run_files import VERSIONS_FILE
from megatron_minpro.tracking.sampled_count import SAMPLED_FILE, read_sampled
from megatron_minpro.tracking.tensorboard import TENSORBOARD_FOLDER
from megatron_minpro.tracking.token_records import TOKENS_FOLDER
from megatron_minpro.tracking.wandb import WANDB_FOLDER

ENDPOINTS_FILE = "endpoints.json"  # addresses of the rollout servers, once they answer
STOP_FILE = "stop"  # its presence asks the run to stop, with a checkpoint
ERROR_FILE = "error.txt"  # what the first rank to fail said
LOST_FILE = "rollouts_lost.json"  # responses sampled by attempts that ended before they were in a checkpoint
ATTEMPTS_FILE = "attempts.jsonl"  # how each start of a job began and ended
LATEST_FILE = "latest"  # in checkpoints/: name of the newest complete checkpoint
STATE_FILE = "run.json"  # in a checkpoint: where the run stands
PAGE_FILE = "report.html"  # the page about the run
LOCK_FILE = "lock"  # held by the process that owns the run
EXPORT_FOLDER = "policy"  # the trained policy, Hugging Face format
INITIAL_MODEL_FOLDER = "initial_model"  # random weights that the base model starts from


def forget_unfinished_attempt(run_dir: Path) -> None:
    """Remove what an attempt wrote that ended before its first checkpoint: a new one must not take it for its own.

    What it had sampled is lost, and that is all that is remembered of it.
    """
    if sampled := read_sampled(run_dir):  # with those lost before
        write_atomically(run_dir / LOST_FILE, f"{sampled}\n")
    for path in (run_dir / METRICS_FILE, run_dir / VERSIONS_FILE, *run_dir.glob("evaluation_*.json")):
        path.unlink(missing_ok=True)
    for name in (TENSORBOARD_FOLDER, ROLLOUTS_FOLDER, TOKENS_FOLDER, WANDB_FOLDER, *BATCH_FOLDERS):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / SAMPLED_FILE).unlink(missing_ok=True)  # last: an attempt that ends before this line counts the same again
