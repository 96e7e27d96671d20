"""One of two ranks that write checkpoints while the disk of one is full, then the disk of all, then silent. Arguments: folder, disk."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.config import load_config
from megatron_minpro.loop.counters import RunCounters
from megatron_minpro.run.checkpoint_writer import CheckpointWriter
from parallel.actor_checkpoint import Captured, write_shards

CONFIG = load_config(Path(__file__).resolve().parents[3] / "configs/tiny_moe_cpu.yaml", [])
assert CONFIG.model.warm_up is not None
MODEL: dict[str, Any] = CONFIG.model.warm_up.architecture | {"vocab_size": 32}
LIMIT_S = 1.0


class Actor:
    """Keeps one tensor per rank."""

    architecture = Architecture.from_config(MODEL, source="test")

    def __init__(self) -> None:
        self.policy_version = 0
        self.elsewhere: Path | None = None  # where this rank's part goes instead
        self.before: Callable[[], None] = lambda: None

    def capture(self, directory: Path) -> Captured:
        content = {f"rank {dist.get_rank()}": torch.full((20_000,), float(self.policy_version))}
        place, before = directory if self.elsewhere is None else self.elsewhere, self.before

        def write(group: dist.ProcessGroup) -> None:
            before()
            write_shards(place, content, checkpoint.DefaultSavePlanner(), group, small_files={})

        return Captured(num_bytes=80_000, write=write)


def main(folder: Path, disk: Path) -> None:
    """disk: small and full, but for the checkpoints of step 1 and 3 there would be room."""
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    rank = dist.get_rank()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_minpro").addHandler(handler)
    directory = folder / "checkpoints"
    groups = {"control_group": dist.group.WORLD, "saving_group": dist.new_group(backend="gloo")}
    writer = CheckpointWriter(directory, run_dir=folder, keep=2, limit_s=lambda num_bytes: LIMIT_S + num_bytes / 1e9, **groups)
    actor = Actor()

    def save(step: int) -> None:
        actor.policy_version = step
        counters = RunCounters(next_step=step)
        writer.save(actor=actor, config=CONFIG, counters=counters, cursor={} if rank == 0 else None, waiting=[])  # type: ignore[arg-type]
        dist.barrier()  # training's collectives go on meanwhile

    def wait() -> str:
        try:
            writer.wait()
        except RuntimeError as error:
            return str(error)
        return ""

    save(1)
    actor.elsewhere = disk if rank == 1 else None
    save(2)
    told = {"full for rank 1": wait()}
    actor.elsewhere = None
    save(3)
    told["room again"] = wait()
    fifo = folder / "silent"
    actor.before = (lambda: fifo.read_bytes() and None) if rank == 1 else (lambda: None)  # it answers when somebody writes
    save(4)
    actor.before = lambda: None
    save(5)
    told["silent"] = wait()
    if rank == 0:
        fifo.write_bytes(b"go on")
    dist.barrier()
    save(6)
    while wait():  # the thread of step 4 may not have ended yet
        save(6)
    (folder / f"told_{rank}.json").write_text(json.dumps({"raised": told, "logged": lines}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
