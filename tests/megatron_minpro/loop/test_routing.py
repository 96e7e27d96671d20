"""Routing replay in the loop: recorded at scoring or come with the batch, replayed in its updates, the file gone when it is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from checkpoints_convert.hf_config import Architecture
from megatron_minpro.batch.routing_file import RoutingAppender
from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.config import RunConfig
from megatron_minpro.loop.counters import UnfinishedStep
from megatron_minpro.loop.phase_timer import PhaseTimer
from megatron_minpro.loop.routing import trained_metrics
from megatron_minpro.loop.schedule import train
from megatron_minpro.loop.step_under_way import StepUnderWay, continued
from megatron_minpro.tracking.metrics_table import check_declared
from parallel.actor import UpdateReport
from parallel.routing_replay import RoutingCounts, RowSink
from parallel.token_sequence import TokenSequence
from tests.megatron_minpro.loop.diary import Diary, FakeActor, MakeBatch, small_config

MODEL = small_config().model.warm_up
assert MODEL is not None
ARCHITECTURE = Architecture.from_config(MODEL.architecture | {"vocab_size": 32}, source="test")


class RoutingActor(FakeActor):
    """Its routers choose the experts (version, version + 1) for every token; `seen`: the first expert met by each update."""

    architecture = ARCHITECTURE

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.routing: RoutingCounts | None = None
        self.seen: list[tuple[int, set[int]]] = []
        self.scored_with: list[set[int]] = []

    def logprobs(
        self, sequences: Sequence[TokenSequence], *, record: RowSink | None = None, entropies: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        if record is not None:
            for index, sequence in enumerate(sequences):
                for layer in range(ARCHITECTURE.num_hidden_layers):
                    rows = torch.tensor([self.policy_version, self.policy_version + 1], dtype=torch.uint8)
                    record.write(index, layer, 0, rows.repeat(sequence.num_positions, 1))
        self.scored_with.append({int(sequence.experts[0, 0, 0]) for sequence in sequences if sequence.experts is not None})
        self.routing = RoutingCounts(replayed=80, missing=20, differing=20) if self.scored_with[-1] else None
        return super().logprobs(sequences, entropies=entropies)

    def update(self, minibatch: Sequence[TokenSequence], loss_fn: Any, *, learning_rate: float) -> UpdateReport:
        assert all(sequence.experts is not None for sequence in minibatch)
        self.seen.append((self.policy_version, {int(sequence.experts.min()) for sequence in minibatch if sequence.experts is not None}))
        routing = RoutingCounts(replayed=100, missing=0, differing=self.policy_version)
        return replace(super().update(minibatch, loss_fn, learning_rate=learning_rate), routing=routing)


def diary_of(config: RunConfig, group: dist.ProcessGroup, make_batch: MakeBatch) -> tuple[Diary, RoutingActor]:
    diary = Diary(config, group, make_batch)
    config.run_dir.mkdir(parents=True)
    diary.actor = diary.run.actor = actor = RoutingActor(diary.lines)  # type: ignore[assignment]
    return diary, actor


@pytest.mark.parametrize("schedule", ["serial", "overlapped"])
def test_the_experts_of_the_scoring_pass_are_met_by_every_update(
    schedule: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    config = small_config(f"output_dir={tmp_path}", f"schedule={schedule}", "actor.routing_replay=trainer")
    diary, actor = diary_of(config, one_rank_group, make_batch)
    waiting: list[list[str]] = []
    diary.run.at_step = lambda step: waiting.append(sorted(path.name for path in (config.run_dir / "routing").glob("*")))
    train(diary.run)
    assert [row.get("routing/differing") for _, row in diary.driver.lines] == [None, None, 0.005, 0.025, 0.045, 0.065]
    # Batches 0, 1 and 2 are sampled and scored under version 0, batch 3 under version 2; two updates each.
    assert actor.seen == [(0, {0}), (1, {0}), (2, {0}), (3, {0}), (4, {0}), (5, {0}), (6, {2}), (7, {2})]
    assert actor.scored_with == [set()] * 4
    assert list((config.run_dir / "routing").iterdir()) == []
    if schedule == "serial":
        names = [f"step_{step:06d}.rows" for step in range(4)]
        assert waiting == [[], names[:1], names[:2], names[1:3], names[2:], names[3:]]


@pytest.mark.parametrize("schedule", ["serial", "overlapped"])
def test_the_servers_experts_are_met_in_scoring_and_by_every_update(
    schedule: str, one_rank_group: dist.ProcessGroup, make_batch: MakeBatch, tmp_path: Path
) -> None:
    """The servers chose (version + 2, version + 3) for every token; of the first response nothing is known."""
    config = small_config(f"output_dir={tmp_path}", f"schedule={schedule}", "actor.routing_replay=server")
    diary, actor = diary_of(config, one_rank_group, make_batch)

    def sampled(step: int, *, version: int, **fields: Any) -> RolloutBatch:
        batch = make_batch(step, version=version, **fields)
        file = RoutingAppender(config.run_dir / "routing", ARCHITECTURE, step=step)
        ids = [np.full((len(x.token_ids) - 1, ARCHITECTURE.num_hidden_layers, 2), [version + 2, version + 3], "<i4") for x in batch.samples]
        places = [file.keep(each.tobytes(), num_inputs=len(each)) for each in ids]
        return replace(batch, routing=file.close([None, *places[1:]]))

    diary.driver.make_batch = sampled
    train(diary.run)
    missing = 255
    assert actor.scored_with == [{2, missing}] * 3 + [{4, missing}]
    assert [(version, experts - {missing}) for version, experts in actor.seen] == [(v, {2}) for v in range(6)] + [(6, {4}), (7, {4})]
    assert sum(missing in experts for _, experts in actor.seen) == 4  # one of the two updates of every batch
    scored = [(row.get("routing/scored_missing"), row.get("routing/scored_differing")) for _, row in diary.driver.lines]
    assert scored == [(0.2, 0.25)] * 4 + [(None, None)] * 2
    assert list((config.run_dir / "routing").iterdir()) == []


def test_what_updates_replayed_survives_a_stop_between_them() -> None:
    report = UpdateReport(
        loss=1.0,
        grad_norm=0.5,
        learning_rate=1e-3,
        policy_version=5,
        num_tokens=7,
        metrics={},
        routing=RoutingCounts(replayed=10, missing=2, differing=3),
    )
    timer = PhaseTimer(lambda phase: None)
    record = StepUnderWay(step=3, timer=timer, batch="missing", updates=1, lags=[2], reports=[report]).record()
    assert record is not None
    read = UnfinishedStep(**{**json.loads(json.dumps(asdict(record))), "seconds": timer.reading()})
    assert continued(read, step=3, timer=timer).reports == [report]


def test_differing_rows_are_told_per_lag_and_missing_ones_are_none_of_them() -> None:
    first, last = RoutingCounts(replayed=100, missing=0, differing=1), RoutingCounts(replayed=50, missing=50, differing=20)
    found = trained_metrics([first, last])
    check_declared(found)
    assert found == {
        "routing/missing": 50 / 200,
        "routing/differing": 21 / 150,
        "routing/differing_lag_min": 0.01,
        "routing/differing_lag_max": 0.4,
    }
    assert trained_metrics([None, None]) == {}
    assert trained_metrics([RoutingCounts(replayed=0, missing=10, differing=0)]) == {"routing/missing": 1.0}
