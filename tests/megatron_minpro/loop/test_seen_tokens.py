"""Which responses are recorded, and how the parts of all ranks come together. test_routing_ranks.py shows the values on real layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_minpro.batch.sample import RolloutBatch, Sample
from megatron_minpro.loop.seen_tokens import MARK, SeenTokens, recorded_groups
from megatron_minpro.loop.update import make_loss_function
from megatron_minpro.objectives import ObjectiveOutput, TokenBatch, make_objective
from megatron_minpro.tracking.token_records import CUT_NOT_TOLD
from parallel.sequence_shard import SequenceShard

MakeBatch = Callable[..., RolloutBatch]


def with_rewards(batch: RolloutBatch, rewards: list[float]) -> RolloutBatch:
    samples = [replace(sample, reward=reward) for sample, reward in zip(batch.samples, rewards, strict=True)]
    return replace(batch, samples=tuple(samples))


def test_groups_whose_rewards_differ_are_recorded_first(make_batch: MakeBatch) -> None:
    batch = with_rewards(make_batch(0, groups=4), [1, 1, 0, 1, 0, 0, 1, 0])
    ids = [sample.sample_id for sample in batch.samples]
    assert recorded_groups(batch, 0) == {}
    assert recorded_groups(batch, 1) == {ids[2]: 1, ids[3]: 1}
    assert recorded_groups(batch, 3) == {ids[0]: 0, ids[1]: 0, ids[2]: 1, ids[3]: 1, ids[6]: 3, ids[7]: 3}
    assert recorded_groups(batch, 9) == {name: number // 2 for number, name in enumerate(ids)}


def loss_arguments(samples: list[Sample], seen: SeenTokens) -> dict[str, Any]:
    """What the actor gives a loss function: all sequences in one micro-batch."""
    sequences = seen.mark([sample.training_sequence() for sample in samples])
    shard = SequenceShard.whole([sequence.num_positions for sequence in sequences], multiple_of=4)
    streams = {name: shard.local([sequence.streams[name] for sequence in sequences], fill=0.0) for name in sequences[0].streams}
    generator = torch.Generator().manual_seed(0)
    return {
        "logprobs_T": (streams["behaviour_logprobs"] + 0.5 * torch.randn(shard.num_local_tokens, generator=generator)).requires_grad_(),
        "entropy_T": torch.rand(shard.num_local_tokens, generator=generator),
        "loss_mask_T": shard.local([sequence.loss_mask for sequence in sequences], fill=False),
        "streams": streams,
        "top": None,
        "shard": shard,
        "global_tokens": sum(sample.num_response_tokens for sample in samples),
        "global_sequences": len(samples),
    }


def test_recording_changes_no_bit_of_loss_gradient_or_metrics(make_batch: MakeBatch, one_rank_group: dist.ProcessGroup) -> None:
    batch = with_rewards(make_batch(0, groups=2), [1, 1, 0, 1])
    samples = list(batch.samples)
    seen = SeenTokens(samples=samples, groups=recorded_groups(batch, 1))
    arguments = loss_arguments(samples, seen)
    unmarked = {**arguments, "streams": {name: x for name, x in arguments["streams"].items() if name != MARK}}
    objective = make_objective("minpro")
    found, metrics = make_loss_function(objective, lag=0, seen=seen)(**arguments)
    expected, expected_metrics = make_loss_function(objective, lag=0)(**unmarked)
    assert torch.equal(found, expected)
    assert metrics.keys() == expected_metrics.keys()
    assert all(torch.equal(metrics[name], expected_metrics[name]) for name in metrics)
    gradients = [torch.autograd.grad(loss, arguments["logprobs_T"])[0] for loss in (found, expected)]
    assert torch.equal(*gradients)

    parts = seen.gather(speaks=True, group=one_rank_group)
    assert parts is not None
    records = seen.records(parts, batch=batch, global_step=3, update=1, policy_version=7, objective="minpro")
    assert [response.sample_id for response in records.responses] == [samples[2].sample_id, samples[3].sample_id]
    assert [response.group for response in records.responses] == [1, 1]
    chosen_T = (arguments["streams"][MARK] > 2) & arguments["loss_mask_T"]
    np.testing.assert_array_equal(records.streams["logprobs"], arguments["logprobs_T"].detach()[chosen_T].numpy())
    np.testing.assert_array_equal(records.streams["entropy"], arguments["entropy_T"][chosen_T].numpy())
    assert records.lag == 7 - batch.policy_version


def test_a_token_that_is_missing_or_came_twice_is_noticed(make_batch: MakeBatch, one_rank_group: dist.ProcessGroup) -> None:
    batch = make_batch(0, groups=2)
    samples = list(batch.samples)
    seen = SeenTokens(samples=samples, groups=recorded_groups(batch, 2))
    make_loss_function(make_objective("grpo"), lag=0, seen=seen)(**loss_arguments(samples, seen))
    parts = seen.gather(speaks=True, group=one_rank_group)
    assert parts is not None and seen.gather(speaks=False, group=one_rank_group) == []
    (places, values), *_ = parts
    for wrong in ([(places[1:], values[1:])], [*parts, (places[:1], values[:1])]):
        with pytest.raises(ValueError, match=f"step 3, update 1: {sum(len(x) for x, _ in wrong)} recorded tokens, expected each of"):
            seen.records(wrong, batch=batch, global_step=3, update=1, policy_version=7, objective="grpo")


def test_what_a_users_objective_does_not_say_is_not_filled_in(make_batch: MakeBatch, one_rank_group: dist.ProcessGroup) -> None:
    batch = make_batch(0, groups=1)
    seen = SeenTokens(samples=list(batch.samples), groups=recorded_groups(batch, 1))
    inner = make_objective("cispo")

    def silent(tokens: TokenBatch, statistics: None) -> ObjectiveOutput:
        return replace(inner(tokens, statistics), prefix_min_T=None, cumulative_T=None, cut_T=None)

    make_loss_function(silent, lag=0, seen=seen)(**loss_arguments(list(batch.samples), seen))  # type: ignore[arg-type]
    parts = seen.gather(speaks=True, group=one_rank_group)
    assert parts is not None
    streams = seen.records(parts, batch=batch, global_step=0, update=0, policy_version=0, objective="users").streams
    assert np.isnan(streams["prefix_min"]).all() and np.isnan(streams["cumulative"]).all() and (streams["cut"] == CUT_NOT_TOLD).all()
    assert np.isfinite(streams["weights"]).all()
