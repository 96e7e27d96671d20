"""The balance loss of experts: plain loops over sequences, tokens and experts say the same. On every layout: test_actor.py."""

from __future__ import annotations

import pytest
import torch

from parallel.layers.router import sequence_balance_loss


def in_loops(probs: list[list[list[float]]], weights: list[float], experts_per_token: int) -> float:
    """probs[sequence][token][expert]; every token chooses its most probable experts."""
    total = 0.0
    for tokens, weight in zip(probs, weights, strict=True):
        for expert in range(len(tokens[0])):
            chosen = sum(expert in sorted(range(len(p)), key=lambda e, p=p: -p[e])[:experts_per_token] for p in tokens)
            share = chosen / (len(tokens) * experts_per_token)
            mean = sum(p[expert] for p in tokens) / len(tokens)
            total += weight * len(tokens[0]) * share * mean
    return total


def packed(probs: torch.Tensor, lengths: list[int], experts_per_token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices per sequence and expert, and every token's sequence."""
    sequence_id_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    chosen_TE = torch.zeros_like(probs).scatter(1, probs.topk(experts_per_token).indices, 1.0)
    return torch.zeros(len(lengths), probs.size(1)).index_add(0, sequence_id_T, chosen_TE), sequence_id_T


def test_balanced_experts_cost_one_and_a_single_expert_their_number() -> None:
    even = torch.eye(4)  # four tokens, one expert each, with certainty
    chosen_SE, ids = packed(even, [4], 1)
    lengths, weights = torch.tensor([4.0]), torch.tensor([1.0])
    assert float(sequence_balance_loss(even, chosen_SE, ids, lengths, weights, experts_per_token=1)) == 1.0
    same = torch.eye(4)[torch.zeros(4, dtype=torch.int64)]
    chosen_SE, ids = packed(same, [4], 1)
    assert float(sequence_balance_loss(same, chosen_SE, ids, lengths, weights, experts_per_token=1)) == 4.0


@pytest.mark.parametrize("experts_per_token", [1, 2, 5])
def test_packed_sequences_equal_loops(experts_per_token: int) -> None:
    torch.manual_seed(0)
    lengths, weights = [3, 1, 7], [0.25, 0.5, 0.0]
    probs = torch.randn(11, 5).softmax(-1)
    chosen_SE, ids = packed(probs, lengths, experts_per_token)
    found = sequence_balance_loss(
        probs, chosen_SE, ids, torch.tensor(lengths).float(), torch.tensor(weights), experts_per_token=experts_per_token
    )
    expected = in_loops([x.tolist() for x in probs.split(lengths)], weights, experts_per_token)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_parts_of_two_ranks_add_up() -> None:
    torch.manual_seed(1)
    lengths, weights = torch.tensor([4.0, 6.0]), torch.tensor([0.5, 0.5])
    probs = torch.randn(10, 3).softmax(-1)
    chosen_SE, ids = packed(probs, [4, 6], 2)
    whole = sequence_balance_loss(probs, chosen_SE, ids, lengths, weights, experts_per_token=2)
    parts = [sequence_balance_loss(probs[rank::2], chosen_SE, ids[rank::2], lengths, weights, experts_per_token=2) for rank in (0, 1)]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
