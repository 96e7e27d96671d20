"""Files of waiting batches in a checkpoint: whole, whatever becomes of the run's own files, and back in place on resume."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_minpro.batch.routing_file import RoutingFile
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.batch.top_tokens_file import TopTokensAppender
from megatron_minpro.run.batch_files import restore_files
from megatron_minpro.run.run_state import refuse_unusable
from tests.megatron_minpro.run.test_run_state import CONFIG, FakeActor, begin, load, save, writer

MakeBatch = Callable[..., RolloutBatch]
LENGTHS = [4] * 4


def routed(make_batch: MakeBatch, run_dir: Path, step: int) -> RolloutBatch:
    """A batch whose tokens all visited the experts (step, 7), and whose likeliest tokens were (step, 8)."""
    architecture = FakeActor().architecture
    file = RoutingFile.of(architecture, step=step, lengths=LENGTHS)
    file.create(run_dir / "routing")
    with file.writer(run_dir / "routing", LENGTHS) as rows:
        for index in range(4):
            for layer in range(architecture.num_hidden_layers):
                rows.write(index, layer, 0, torch.tensor([[step, 7]] * 4, dtype=torch.uint8))
    batch = make_batch(step)
    top = TopTokensAppender(run_dir, top_k=2, vocab_size=20, step=step)
    lengths = [sample.num_response_tokens for sample in batch.samples]
    places = [top.keep(np.array([[step, 8]] * n, dtype=np.int32), np.full((n, 2), -2.0, dtype=np.float32)) for n in lengths]
    return replace(batch, routing=file, top_tokens=top.close(places))


def held(run_dir: Path, batch: RolloutBatch) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    """Experts and likeliest tokens, as the files in the run folder have them."""
    assert batch.routing is not None and batch.top_tokens is not None
    top = batch.top_tokens.rows(run_dir, [sample.num_response_tokens for sample in batch.samples])
    experts = {tuple(row) for rows in batch.routing.rows(run_dir / "routing", LENGTHS) for row in rows.flatten(0, 1).tolist()}
    return experts, {tuple(row) for rows in top for row in rows.ids.tolist()}


def test_a_batch_trained_while_its_checkpoint_is_written_stays_in_it(
    one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    waiting = tuple(routed(make_batch, tmp_path, step) for step in (3, 4))
    one, actor = writer(tmp_path / "checkpoints", one_rank_group), FakeActor(80)
    actor.may_write.clear()
    begin(one, 5, actor=actor, waiting=waiting)
    for path in waiting[0].files:
        (tmp_path / path).unlink()
    actor.may_write.set()
    one.wait()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "checkpoints", moved / "checkpoints")
    for run_dir in (tmp_path, moved):
        for path in ("routing/step_000005.rows", "top_tokens/step_000005.top"):
            (run_dir / path).parent.mkdir(exist_ok=True)
            (run_dir / path).write_bytes(b"of a batch that is sampled again")
        checkpoint = run_dir / "checkpoints/step_000005"
        found = load(checkpoint).waiting
        restore_files(checkpoint, run_dir, found)
        assert [held(run_dir, batch) for batch in found] == [({(3, 7)}, {(3, 8)}), ({(4, 7)}, {(4, 8)})]
        assert sorted(path.name for path in (run_dir / "routing").iterdir()) == ["step_000003.rows", "step_000004.rows"]
        assert sorted(path.name for path in (run_dir / "top_tokens").iterdir()) == ["step_000003.top", "step_000004.top"]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("path", ["routing/step_000000.rows", "top_tokens/step_000000.top"])
def test_a_checkpoint_without_a_batchs_file_is_refused_by_its_name(
    path: str, damage: Callable[[Path], object], one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path / "checkpoints", 1, waiting=(routed(make_batch, tmp_path, 0),))
    refuse_unusable(checkpoint, CONFIG)
    damage(checkpoint / path)
    with pytest.raises(ValueError, match=rf"step_000001/{path}: .* expected \d+ bytes"):
        refuse_unusable(checkpoint, CONFIG)


def test_a_file_system_without_second_names_gets_a_copy(one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path) -> None:
    batch = routed(make_batch, tmp_path, 3)
    with mock.patch.object(os, "link", side_effect=OSError(errno.EXDEV, "Invalid cross-device link")):
        checkpoint = save(tmp_path / "checkpoints", 4, waiting=(batch,))
        restore_files(checkpoint, tmp_path, (batch,))
    assert batch.files == ["routing/step_000003.rows", "top_tokens/step_000003.top"]
    assert all((checkpoint / path).stat().st_nlink == 1 for path in batch.files) and held(tmp_path, batch) == ({(3, 7)}, {(3, 8)})
    with (
        mock.patch.object(os, "link", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(RuntimeError, match="space"),
    ):
        save(tmp_path / "checkpoints", 5, waiting=(batch,))
