"""RUN_DIR/rollouts_sampled.json: how many responses the run has sampled, written when a batch arrives.

A batch's line of metrics comes later: under the overlapped schedule a whole step later. An attempt that ends in between has sampled the
batch nevertheless.
"""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics

SAMPLED_FILE = "rollouts_sampled.json"


def write_sampled(run_dir: Path, rollouts_sampled: int) -> None:
    """Keep the count. It includes responses of earlier attempts, lost ones too."""
    write_atomically(run_dir / SAMPLED_FILE, f"{rollouts_sampled}\n")


def read_sampled(run_dir: Path) -> int:
    """What all attempts so far have sampled, by this file and by the metrics; 0 before the first batch."""
    path = run_dir / SAMPLED_FILE
    counts = [int(line.get("total/rollouts_sampled") or 0) for line in read_metrics(run_dir / METRICS_FILE)]
    if path.exists():
        counts.append(json.loads(path.read_text(encoding="utf-8")))
    return max(counts, default=0)
