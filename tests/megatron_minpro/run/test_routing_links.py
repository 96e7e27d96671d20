"""Experts of waiting batches in a checkpoint: whole, whatever becomes of the run's own files, and back in place on resume."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_minpro.batch.routing_file import RoutingFile
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.run.routing_links import restore_experts
from megatron_minpro.run.run_state import refuse_unusable
from tests.megatron_minpro.run.test_run_state import CONFIG, FakeActor, begin, load, save, writer

MakeBatch = Callable[..., RolloutBatch]
LENGTHS = [4] * 4


def routed(make_batch: MakeBatch, run_dir: Path, step: int) -> RolloutBatch:
    """A batch whose tokens all visited the experts (step, 7)."""
    architecture = FakeActor().architecture
    file = RoutingFile.of(architecture, step=step, lengths=LENGTHS)
    file.create(run_dir / "routing")
    with file.writer(run_dir / "routing", LENGTHS) as rows:
        for index in range(4):
            for layer in range(architecture.num_hidden_layers):
                rows.write(index, layer, 0, torch.tensor([[step, 7]] * 4, dtype=torch.uint8))
    return replace(make_batch(step), routing=file)


def experts(run_dir: Path, batch: RolloutBatch) -> set[tuple[int, ...]]:
    assert batch.routing is not None
    return {tuple(row) for rows in batch.routing.rows(run_dir / "routing", LENGTHS) for row in rows.flatten(0, 1).tolist()}


def test_a_batch_trained_while_its_checkpoint_is_written_stays_in_it(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    waiting = tuple(routed(make_batch, tmp_path, step) for step in (3, 4))
    one, actor = writer(tmp_path / "checkpoints", one_rank_group), FakeActor(80)
    actor.may_write.clear()
    begin(one, 5, actor=actor, waiting=waiting)
    (tmp_path / "routing/step_000003.rows").unlink()
    actor.may_write.set()
    one.wait()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "checkpoints", moved / "checkpoints")
    for run_dir in (tmp_path, moved):
        (run_dir / "routing").mkdir(exist_ok=True)
        (run_dir / "routing/step_000005.rows").write_bytes(b"of a batch that is sampled again")
        checkpoint = run_dir / "checkpoints/step_000005"
        found = load(checkpoint).waiting
        restore_experts(checkpoint, run_dir / "routing", found)
        assert [experts(run_dir, batch) for batch in found] == [{(3, 7)}, {(4, 7)}]
        assert sorted(path.name for path in (run_dir / "routing").iterdir()) == ["step_000003.rows", "step_000004.rows"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_checkpoint_without_the_experts_is_refused_by_the_files_name(
    damage: Callable[[Path], object], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path / "checkpoints", 1, waiting=(routed(make_batch, tmp_path, 0),))
    refuse_unusable(checkpoint, CONFIG)
    damage(checkpoint / "routing/step_000000.rows")
    with pytest.raises(ValueError, match=r"step_000001/routing/step_000000\.rows: .* expected \d+ bytes"):
        refuse_unusable(checkpoint, CONFIG)


def test_a_file_system_without_second_names_gets_a_copy(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = routed(make_batch, tmp_path, 3)
    with mock.patch.object(os, "link", side_effect=OSError(errno.EXDEV, "Invalid cross-device link")):
        checkpoint = save(tmp_path / "checkpoints", 4, waiting=(batch,))
        restore_experts(checkpoint, tmp_path / "routing", (batch,))
    kept = checkpoint / "routing/step_000003.rows"
    assert kept.stat().st_nlink == 1 and experts(tmp_path, batch) == {(3, 7)}
    with (
        mock.patch.object(os, "link", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(RuntimeError, match="space"),
    ):
        save(tmp_path / "checkpoints", 5, waiting=(batch,))
