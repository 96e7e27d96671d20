"""What a sampler gives the trainer, and what it leaves for people to read."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_minpro.batch.streams import unpack
from megatron_minpro.loop.sampler import LocalSampler
from megatron_minpro.tracking.rollout_log import RolloutLog
from tests.megatron_minpro.conftest import content
from tests.megatron_minpro.loop.diary import small_config
from tests.megatron_minpro.loop.test_collector import GROUP, Client, SecondWord, make_collector


def make_sampler(*settings: str, rollouts: RolloutLog | None = None) -> LocalSampler:
    collector = make_collector(Client(), SecondWord())
    return LocalSampler(
        config=small_config(*settings), collector=collector, responder=collector._responder, held_out_prompts=(), rollouts=rollouts
    )


def test_the_trainer_gets_the_collected_batch_and_its_cursor() -> None:
    sampled, collected = make_sampler().collect(6, policy_version=4), make_collector(Client(), SecondWord()).collect(6, policy_version=4)
    assert content([unpack(*sampled.batch)]) == content([collected.batch])
    assert sampled.cursor == collected.cursor and sampled.cursor["position"] == 0 and sampled.cursor["epoch"] == 1
    assert sampled.num_dropped == 0
    # Two groups of rewards 5, 5, 5 and 0, 1, 2; three tokens each; the first response of a group is cut.
    expected = {
        "reward/sampled": 3.0,
        "reward/correct": 1 / 6,
        "reward/zero_variance_groups": 0.5,
        "rollout/tokens": 18,
        "reward/errors": 0,
    }
    assert expected.items() <= dict(sampled.metrics).items()
    assert "rollout/rounds" not in sampled.metrics


def test_rounds_are_told_of_where_groups_may_be_dropped() -> None:
    sampled = make_sampler("rollout.dynamic_sampling={equal: reward, max_rounds: 2}").collect(0, policy_version=4)
    assert {"rollout/rounds": 1, "rollout/equal_groups": 0, "rollout/dropped": 0}.items() <= dict(sampled.metrics).items()


def test_people_read_every_response_in_the_order_of_the_batch(tmp_path: Path) -> None:
    sampled = make_sampler(rollouts=RolloutLog(tmp_path)).collect(12, policy_version=4)
    rows = [json.loads(line) for line in (tmp_path / "rollouts/step_000012.jsonl").read_text().splitlines()]
    samples = unpack(*sampled.batch).samples
    assert len(rows) == len(samples) == 2 * GROUP
    for row, sample in zip(rows, samples, strict=True):
        assert row["response"].startswith(f"{sample.token_ids[0]} ") and row["answer"] == str(int(sample.token_ids[0]))
        assert (row["reward"], row["advantage"], row["policy_version"], row["dropped"]) == (sample.reward, sample.advantage, 4, None)
