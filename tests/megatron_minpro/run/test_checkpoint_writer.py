"""Two ranks write checkpoints together: what happens to the disk of one is told to both, and neither ends nor waits for ever."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint

from megatron_minpro.run.background_write import time_limit_s
from tests.rank_pool import RankPool


@pytest.mark.ranks
def test_a_full_and_a_silent_disk_of_one_rank_end_neither(ranks: RankPool, tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64 << 10)  # a rank's part has 80 kB
    (tmp_path / "checkpoints").mkdir()
    os.mkfifo(tmp_path / "silent")
    ranks.run(Path(__file__).with_name("checkpoint_ranks.py"), tmp_path, disk, world_size=2, timeout_s=300)
    told = [json.loads((tmp_path / f"told_{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0]["raised"] == told[1]["raised"]  # all ranks together
    raised = told[0]["raised"]
    full = (
        "checkpoint step_000002 was not written, step_000001 stays the newest: "
        rf"rank 1: OSError: \[Errno 28\] No space left on device: '{disk}/__1_0.distcp'; "
        r"it needs about 160,000 bytes beside the 2 that are kept \(checkpoint.keep\), [\d,]+ are free on /.*"
    )
    silent = (
        r"checkpoint step_000005 is skipped: step_000004 has been under way for \d+ s, expected at most 1: its file system does not answer"
    )
    assert re.fullmatch(full, raised["full for rank 1"]) and re.fullmatch(silent, raised["silent"])
    assert raised["room again"] == ""
    first = [f"{raised['full for rank 1']}; training goes on until the next one", f"{raised['silent']}; training goes on"]
    assert told[0]["logged"][:2] == first and all("checkpoint step_000006 is skipped" in line for line in told[0]["logged"][2:])
    assert told[1]["logged"] == []  # one line, not one per rank
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_000004", "step_000006"]
    for step in (4, 6):  # what was late is complete too
        kept = {name: torch.zeros(20_000) for name in ("rank 0", "rank 1")}
        checkpoint.load(kept, checkpoint_id=tmp_path / f"checkpoints/step_{step:06d}/actor", no_dist=True)
        assert [tensor.unique().tolist() for tensor in kept.values()] == [[step], [step]]


def test_the_time_limit_of_a_checkpoint_follows_from_its_bytes() -> None:
    assert time_limit_s(0) == 300
    assert time_limit_s(427 * 10**9) == pytest.approx(300 + 1708)  # the 30B with Adam's moments in float32
