"""A sample's streams on logit positions, and how a batch is dealt out to mini-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_minpro.batch.sample import RolloutBatch, Sample
from rollout.records import VersionSpan

Make = Callable[..., Sample]
MakeBatch = Callable[..., RolloutBatch]


def spans(*described: tuple[int, int, int]) -> tuple[VersionSpan, ...]:
    return tuple(VersionSpan(policy_version=version, start=start, end=end) for version, start, end in described)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_mask": (True,) * 5}, "loss_mask must be False for the first token and True for at least one other"),
        ({"loss_mask": (False,) * 5}, "loss_mask must be False for the first token and True for at least one other"),
        ({"loss_mask": (False, True)}, "loss_mask has 2 entries for 5 tokens"),
        ({"loss_mask": (False, False, True, True, True)}, "2 engine_logprobs for 3 response tokens"),
        ({"version_spans": spans((4, 0, 1))}, r"version_spans \[0, 1\] do not cover 2 response tokens one after the other"),
        (
            {"version_spans": spans((4, 0, 1), (4, 0, 2))},
            r"version_spans \[0, 1, 0, 2\] do not cover 2 response tokens",
        ),
        ({"version_spans": ()}, r"version_spans \[\] do not cover 2 response tokens one after the other"),
        ({"engine_logprobs": (-1.0,)}, "1 engine_logprobs for 2 response tokens"),
        ({"behaviour_logprobs": (-1.0, -2.0, -3.0)}, "3 behaviour_logprobs for 2 response tokens"),
        ({"token_ids": torch.arange(5)}, r"token_ids is torch.int64 \[5\], expected torch.int32 with one axis"),
        ({"engine_logprobs": torch.zeros(2).double()}, r"engine_logprobs is torch.float64 \[2\], expected torch.float32 with one axis"),
        ({"behaviour_logprobs": torch.zeros(1, 2)}, r"behaviour_logprobs is torch.float32 \[1, 2\], expected torch.float32 with one axis"),
    ],
)
def test_a_sample_whose_lengths_disagree_is_refused(make_sample: Make, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^sample-0: {message}"):
        make_sample(0, **fields)


def test_scores_lie_on_the_positions_that_predict_response_tokens(make_sample: Make) -> None:
    sample = make_sample(4, response=3, behaviour_logprobs=None, advantage=-0.5)
    assert sample.num_response_tokens == 3
    scored = sample.scored_with(torch.tensor([-9.0, -8.0, -1.0, -2.0, -3.0]))  # tokens 1..5, of which 3..5 are the response
    assert scored.behaviour_logprobs is not None and scored.behaviour_logprobs.tolist() == [-1.0, -2.0, -3.0]
    sequence = scored.training_sequence()
    assert sequence.token_ids.tolist() == [0, 1, 2, 40, 41, 42]
    assert sequence.loss_mask.tolist() == [False, False, True, True, True]
    assert sequence.streams["behaviour_logprobs"].tolist() == [0.0, 0.0, -1.0, -2.0, -3.0]
    assert sequence.streams["advantages"].tolist() == [0.0, 0.0, -0.5, -0.5, -0.5]


def test_a_conversation_scores_and_trains_the_models_tokens_alone(make_sample: Make) -> None:
    # Prompt 1 2, the model says 3 4, a tool says 5, the model says 6, a tool has the last word, 7.
    sample = make_sample(
        0,
        token_ids=(1, 2, 3, 4, 5, 6, 7),
        loss_mask=(False, False, True, True, False, True, False),
        engine_logprobs=(-0.25, -0.5, -0.75),
        behaviour_logprobs=None,
        version_spans=spans((8, 0, 2), (9, 2, 3)),
        advantage=2.0,
        correction_weights=(0.5, 1.0, 1.5),
    )
    assert (sample.num_response_tokens, sample.policy_versions) == (3, (8, 9))
    assert sample.sequence().loss_mask.tolist() == [False, True, True, False, True, False]
    scored = sample.scored_with(torch.tensor([-9.0, -1.0, -2.0, -8.0, -3.0, -7.0]), torch.tensor([9.0, 0.1, 0.2, 8.0, 0.3, 7.0]))
    assert scored.behaviour_logprobs is not None and scored.behaviour_logprobs.tolist() == [-1.0, -2.0, -3.0]
    streams = scored.training_sequence().streams
    assert streams["behaviour_logprobs"].tolist() == [0.0, -1.0, -2.0, 0.0, -3.0, 0.0]
    assert streams["advantages"].tolist() == [0.0, 2.0, 2.0, 0.0, 2.0, 0.0]
    assert streams["correction_weights"].tolist() == [0.0, 0.5, 1.0, 0.0, 1.5, 0.0]
    assert streams["behaviour_entropies"].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.0, 0.3, 0.0])
    assert "behaviour_entropies" not in sample.scored_with(torch.zeros(6)).training_sequence().streams


def test_a_sample_that_was_never_scored_cannot_be_trained(make_sample: Make) -> None:
    sample = make_sample(7, behaviour_logprobs=None)
    assert sample.sequence().streams == {}
    with pytest.raises(ValueError, match=r"^sample-7: behaviour_logprobs are missing"):
        sample.training_sequence()


def test_a_batch_that_mixes_policy_versions_is_refused(make_batch: MakeBatch, make_sample: Make) -> None:
    samples = make_batch(0, version=3).samples
    for versions in ((2, 3), (3, 4), (4, 4)):
        changed = (*samples[:-1], replace(samples[-1], version_spans=spans((versions[0], 0, 1), (versions[1], 1, 2))))
        with pytest.raises(ValueError, match=r"^sample-3: sampled under policy versions \(., .\), expected 3 throughout$"):
            RolloutBatch(sampled_at_step=0, policy_version=3, group_size=2, samples=changed)


def test_a_batch_of_no_whole_number_of_groups_is_refused(make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"^4 samples are not a whole number of groups of 3$"):
        replace(make_batch(0), group_size=3)


def test_behaviour_logprobs_come_from_the_named_scorer(make_batch: MakeBatch) -> None:
    batch = make_batch(0, behaviour_logprobs=None)
    by_engine = batch.scored_by_engine()
    assert [sample.behaviour_logprobs for sample in by_engine.samples] == [sample.engine_logprobs for sample in batch.samples]
    scores = [torch.full((4,), -float(number)) for number in range(4)]
    assert [sample.behaviour_logprobs.tolist() for sample in batch.scored_with(scores).samples] == [[-float(n)] * 2 for n in range(4)]
    with pytest.raises(ValueError, match="shorter"):
        batch.scored_with(scores[:-1])


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(per_batch=st.integers(1, 4), num_mini_batches=st.integers(1, 6), seed=st.integers(0, 10), step=st.integers(0, 50))
def test_mini_batches_hold_every_sample_once_in_whole_groups(
    make_batch: MakeBatch, per_batch: int, num_mini_batches: int, seed: int, step: int
) -> None:
    batch = make_batch(step, groups=per_batch * num_mini_batches)
    dealt = batch.mini_batches(num_mini_batches=num_mini_batches, seed=seed)
    assert [len(samples) for samples in dealt] == [2 * per_batch] * num_mini_batches
    numbers = [int(sample.sample_id.split("-")[1]) for samples in dealt for sample in samples]
    assert sorted(numbers) == list(range(len(batch.samples)))
    assert all(first % 2 == 0 and second == first + 1 for first, second in zip(numbers[::2], numbers[1::2], strict=True))
    assert batch.mini_batches(num_mini_batches=num_mini_batches, seed=seed) == dealt


def test_the_order_of_groups_depends_on_seed_and_step(make_batch: MakeBatch) -> None:
    def order(step: int, seed: int) -> list[str]:
        return [
            sample.sample_id for samples in make_batch(step, groups=16).mini_batches(num_mini_batches=4, seed=seed) for sample in samples
        ]

    assert len({tuple(order(step, seed)) for step, seed in ((0, 0), (1, 0), (0, 1), (5, 3))}) == 4


def test_groups_that_cannot_be_shared_equally_are_refused(make_batch: MakeBatch) -> None:
    with pytest.raises(ValueError, match=r"^actor\.updates_per_step: 3 does not divide 4 prompts$"):
        make_batch(0, groups=4).mini_batches(num_mini_batches=3, seed=0)


def test_response_tokens_are_counted_without_prompts(make_batch: MakeBatch) -> None:
    assert make_batch(0, groups=3, response=5).num_response_tokens == 30
