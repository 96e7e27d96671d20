"""Two ranks write a checkpoint together: what one of them cannot write is told to both, and nobody waits for ever."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import torch.multiprocessing as mp

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.config import load_config
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from parallel.actor_checkpoint import write_shards

REPOSITORY = Path(__file__).resolve().parents[3]


RECIPE = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", []).model.warm_up
assert RECIPE is not None
MODEL: dict[str, Any] = RECIPE.architecture | {"vocab_size": 32}


class FullDisk(checkpoint.FileSystemWriter):
    def write_data(self, *_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "actor/__1_0.distcp")


class Actor:
    """Keeps one tensor per rank. Rank 1 finds the disk full when the policy version is 2."""

    policy_version = 1
    architecture = Architecture.from_config(MODEL, source="test")

    def capture(self, directory: Path) -> Callable[[dist.ProcessGroup], None]:
        full = dist.get_rank() == 1 and self.policy_version == 2
        content = {f"rank {dist.get_rank()}": torch.full((4,), float(self.policy_version))}

        def write(group: dist.ProcessGroup) -> None:
            with mock.patch.object(checkpoint, "FileSystemWriter", FullDisk if full else checkpoint.FileSystemWriter):
                write_shards(directory, content, checkpoint.DefaultSavePlanner(), group)

        return write


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _write_three_times(rank, folder)
    dist.barrier()
    dist.destroy_process_group()  # nobody holds a group any more: its threads end here, not with the interpreter


def _write_three_times(rank: int, folder: str) -> None:
    assert dist.group.WORLD is not None
    directory = Path(folder) / "checkpoints"
    writer = CheckpointWriter(
        directory, routing=directory / "routing", keep=2, control_group=dist.group.WORLD, saving_group=dist.new_group(backend="gloo")
    )
    actor, config = Actor(), load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [])
    said = []
    for step in (1, 2, 3):
        actor.policy_version = step
        try:
            counters = RunCounters(next_step=step)
            writer.save(actor=actor, config=config, counters=counters, cursor={} if rank == 0 else None, waiting=[])  # type: ignore[arg-type]
            dist.barrier()  # training's collectives go on meanwhile
        except RuntimeError as error:
            said.append(f"{step}: {error}")
    (Path(folder) / f"said_{rank}").write_text("\n".join(said))


@pytest.mark.ranks
def test_a_disk_full_for_one_rank_is_raised_on_both(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    expected = (
        "3: checkpoint step_000002 was not written, the former ones are kept: "
        "RuntimeError: rank 1: OSError: [Errno 28] No space left on device: 'actor/__1_0.distcp'"
    )
    assert [(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)] == [expected, expected]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_000001"
    kept = {name: torch.zeros(4) for name in ("rank 0", "rank 1")}
    checkpoint.load(kept, checkpoint_id=tmp_path / "checkpoints/step_000001/actor", no_dist=True)
    assert [tensor.tolist() for tensor in kept.values()] == [[1.0] * 4] * 2
