from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from checkpoints_convert.logit_error import LogitErrorSum


def random_logits(seed: int, positions: int = 5, vocabulary: int = 7) -> Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(math.fsum(math.exp(value) for value in row))
    return [value - total for value in row]


def test_every_number_equals_a_float64_loop_over_positions() -> None:
    reference_TV, compared_TV, next_tokens = random_logits(0), random_logits(1), [3, 0, 6, 2]
    errors = LogitErrorSum()
    errors.add(reference_TV, compared_TV, torch.tensor(next_tokens))
    result = errors.result()
    pairs = [(log_softmax(a), log_softmax(b)) for a, b in zip(reference_TV.tolist(), compared_TV.tolist(), strict=True)]
    following = [(a[token], b[token]) for (a, b), token in zip(pairs, next_tokens, strict=False)]
    everywhere = [abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    assert (result.num_positions, result.num_next_tokens) == (5, 4)
    assert result.reference_nll == pytest.approx(-sum(a for a, _ in following) / 4, rel=1e-6)
    assert result.compared_nll == pytest.approx(-sum(b for _, b in following) / 4, rel=1e-6)
    assert result.next_token_mean == pytest.approx(sum(abs(a - b) for a, b in following) / 4, rel=1e-6)
    assert result.next_token_max == pytest.approx(max(abs(a - b) for a, b in following), rel=1e-6)
    assert result.vocabulary_mean == pytest.approx(sum(everywhere) / 35, rel=1e-6)
    assert result.vocabulary_max == pytest.approx(max(everywhere), rel=1e-6)
    assert result.kl == pytest.approx(sum(math.exp(x) * (x - y) for a, b in pairs for x, y in zip(a, b, strict=True)) / 5, rel=1e-6)
    assert result.top1_agreement == sum(a.index(max(a)) == b.index(max(b)) for a, b in pairs) / 5


def test_chunks_add_up_to_the_whole() -> None:
    reference_TV, compared_TV, next_tokens = random_logits(2), random_logits(3), torch.tensor([1, 5, 4, 0])
    whole, parts = LogitErrorSum(), LogitErrorSum()
    whole.add(reference_TV, compared_TV, next_tokens)
    for span in (slice(0, 2), slice(2, 4), slice(4, 5)):  # nothing follows the last position
        parts.add(reference_TV[span], compared_TV[span], next_tokens[span])
    assert parts.result().kl == pytest.approx(whole.result().kl, rel=1e-6)
    assert parts.result().num_next_tokens == whole.result().num_next_tokens
    assert parts.result().next_token_max == whole.result().next_token_max


def test_equal_logits_have_no_error_and_a_constant_shift_is_none() -> None:
    logits_TV = random_logits(4)
    errors = LogitErrorSum()
    errors.add(logits_TV, logits_TV + 2.0, torch.tensor([0, 1, 2, 3]))
    assert errors.result().vocabulary_max < 1e-6
    assert errors.result().top1_agreement == 1.0


def test_not_finite_logits_are_refused() -> None:
    logits_TV = random_logits(5)
    broken_TV = logits_TV.clone()
    broken_TV[2, 3] = float("nan")
    with pytest.raises(ValueError, match="the compared model's logits hold NaN"):
        LogitErrorSum().add(logits_TV, broken_TV, torch.tensor([0]))


def test_one_token_prompts_alone_are_refused() -> None:
    errors = LogitErrorSum()
    errors.add(random_logits(6, 1), random_logits(7, 1), torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="at least two tokens"):
        errors.result()
