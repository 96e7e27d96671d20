"""Two gloo ranks, one of them late: the other one's waiting is seen, under the kind of its group."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from parallel.exposed_communication import OTHER, measure_waiting

pytestmark = pytest.mark.ranks
LATE_S = 0.3


def rank_main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dispatch, alone = dist.new_group([0, 1]), [dist.new_group([0]), dist.new_group([1])][rank]
    kinds = {dispatch.group_name: "dispatch"}
    found = []
    for operation in ("sync", "async", "everybody"):
        dist.barrier()
        with measure_waiting(kinds) as seconds:
            if rank == 1:
                time.sleep(LATE_S)
            x, y = torch.ones(2), torch.empty(2)
            if operation == "sync":
                dist.all_to_all_single(y, x, group=dispatch)
            elif operation == "async":
                work = dist.all_reduce(x, group=dispatch, async_op=True)
                work.wait()
            else:
                dist.all_reduce(x)
            dist.all_reduce(x, group=alone)  # of one rank: no communication
        found.append(seconds)
    dist.barrier()  # the class is as it was
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_waiting_for_a_late_rank_is_counted_by_kind(tmp_path: Path) -> None:
    multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    early, late = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for seconds, kind in zip(early, ("dispatch", "dispatch", OTHER), strict=True):
        assert set(seconds) == {kind}
        assert seconds[kind] > 0.5 * LATE_S
    for mine, theirs in zip(late, early, strict=True):
        assert sum(mine.values()) < sum(theirs.values())  # who comes last does not wait
