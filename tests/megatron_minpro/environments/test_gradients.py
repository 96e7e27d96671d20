"""Tool tokens get no gradient: a conversation against a float64 loop that knows the model's tokens alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_minpro.batch.sample import Sample
from megatron_minpro.objectives import TokenBatch, make_objective
from parallel.sequence_shard import SequenceShard
from rollout.records import VersionSpan

# Prompt, answer, tool, answer, tool, answer, closing words of the tool.
MASK = [False] * 4 + [True] * 3 + [False] * 5 + [True] * 2 + [False] * 3 + [True] * 4 + [False] * 2
CLIP_HIGH = 2.0
VOCAB_SIZE = 40


def make_model() -> Any:
    """A small random Qwen3, float32."""
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config).float()


@pytest.fixture(scope="module")
def sample() -> Sample:
    """Off policy: ratios from about 0.5 to 2."""
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(0, VOCAB_SIZE, (len(MASK),), generator=generator, dtype=torch.int32)
    mask = torch.tensor(MASK)
    drift = 0.4 * torch.randn(sum(MASK), generator=generator)
    with torch.no_grad():
        logprobs = token_logprobs(make_model(), token_ids)[mask[1:]] + drift
    return Sample(
        sample_id="conversation",
        token_ids=token_ids,
        loss_mask=mask,
        engine_logprobs=logprobs,
        behaviour_logprobs=logprobs,
        version_spans=(VersionSpan(policy_version=0, start=0, end=sum(MASK)),),
        finish_reason="stop",
        reward=1.0,
        correct=True,
        advantage=0.75,
    )


def token_logprobs(model: Any, token_ids: Tensor) -> Tensor:
    """[L - 1]: position p scores token p + 1."""
    logits = model(token_ids[None].long()).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, token_ids[1:, None].long())[:, 0]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def ours(model: Any, sample: Sample, change: Any = lambda logprobs, tool: logprobs) -> dict[str, Tensor]:
    """Gradients of MinPRO on the sample's training sequence; `change` may spoil the log-probs of tool tokens."""
    sequence = sample.training_sequence()
    shard = SequenceShard.whole([sequence.num_positions], multiple_of=4)
    logprobs = change(token_logprobs(model, sample.token_ids), ~sequence.loss_mask)
    batch = TokenBatch(
        logprobs_T=shard.local([logprobs], fill=0.0),
        behaviour_logprobs_T=shard.local([sequence.streams["behaviour_logprobs"]], fill=0.0),
        advantages_T=shard.local([sequence.streams["advantages"]], fill=0.0),
        loss_mask_T=shard.local([sequence.loss_mask], fill=False),
        shard=shard,
        global_tokens=int(sequence.loss_mask.sum()),
        global_sequences=1,
    )
    make_objective("minpro", clip_low=1.0, clip_high=CLIP_HIGH)(batch).loss.backward()
    return gradients(model)


def reference(model: Any, sample: Sample) -> dict[str, Tensor]:
    """The sum over the model's own tokens, one after the other, in float64; the prefix minimum never sees another token."""
    logprobs = token_logprobs(model, sample.token_ids)
    assert sample.behaviour_logprobs is not None
    behaviour = iter(sample.behaviour_logprobs.double())
    smallest, loss, trained = math.inf, torch.zeros((), dtype=torch.float64), 0
    for position in range(1, len(MASK)):
        if not MASK[position]:
            continue
        logprob = logprobs[position - 1]
        log_ratio = float(logprob.detach() - next(behaviour))
        prefix = 0.0 if math.isinf(smallest) else smallest
        weight = min(math.exp(log_ratio + prefix), 1 + CLIP_HIGH)
        loss = loss - weight * sample.advantage * logprob
        smallest, trained = min(smallest, log_ratio), trained + 1
    (loss / trained).backward()
    return gradients(model)


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest gradient of the same parameter."""
    assert found.keys() == expected.keys()
    return max(float((found[name].double() - g).abs().max() / g.abs().max()) for name, g in expected.items())


def test_gradients_are_those_of_the_models_own_tokens(sample: Sample) -> None:
    assert error(ours(make_model(), sample), reference(make_model().double(), sample)) < 1e-4  # float32 against float64


@pytest.mark.parametrize("spoil", ["detached", "nan", "doubled"])
def test_whatever_tool_tokens_score_changes_no_gradient(sample: Sample, spoil: str) -> None:
    changes = {
        "detached": lambda logprobs, tool: torch.where(tool, logprobs.detach(), logprobs),
        "nan": lambda logprobs, tool: torch.where(tool, torch.nan, logprobs),
        "doubled": lambda logprobs, tool: torch.where(tool, 2 * logprobs, logprobs),
    }
    plain, spoilt = ours(make_model(), sample), ours(make_model(), sample, changes[spoil])
    assert all(torch.equal(plain[name], spoilt[name]) for name in plain)


def test_a_mask_that_trains_tool_tokens_would_be_noticed(sample: Sample) -> None:
    everything = torch.tensor([False] * 4 + [True] * (len(MASK) - 4))
    scores = torch.full((int(everything.sum()),), -3.0)
    fields = {name: getattr(sample, name) for name in Sample.__slots__}
    spans = (VersionSpan(policy_version=0, start=0, end=len(scores)),)
    changed = {"loss_mask": everything, "engine_logprobs": scores, "behaviour_logprobs": scores, "version_spans": spans}
    assert error(ours(make_model(), Sample(**fields | changed)), ours(make_model(), sample)) > 0.1
