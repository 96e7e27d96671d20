"""Tokens sorted by expert: Megatron-Core's own results, and no operator whose result's length only the device knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from parallel import mcore, token_permutation  # mcore first: Megatron-Core is imported behind the CPU hook

NUM_TOKENS, NUM_EXPERTS, TOP_K, HIDDEN = 50, 6, 2, 4


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which experts they chose, and the weights of these choices; the last expert gets none."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(NUM_TOKENS, NUM_EXPERTS - 1, generator=generator).topk(TOP_K).indices
    routing_map = torch.zeros(NUM_TOKENS, NUM_EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
    probs = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator) * routing_map
    return torch.randn(NUM_TOKENS, HIDDEN, generator=generator).requires_grad_(), routing_map, probs.requires_grad_()


def gathering(routing_map: Tensor) -> Any:
    """What `dispatch_postprocess` needs of its dispatcher, on the rank that holds the middle experts."""
    return SimpleNamespace(config=SimpleNamespace(moe_permute_fusion=False), local_expert_indices=[2, 3], routing_map=routing_map)


def backward(*outputs: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs).backward()


def test_the_permutation_and_its_gradients_are_megatrons_bit_for_bit() -> None:
    found = []
    for permute in (token_permutation.permute, token_permutation._permute):
        tokens, routing_map, probs = routed()
        permuted, permuted_probs, order = permute(tokens, routing_map, probs=probs, num_out_tokens=NUM_TOKENS * TOP_K)
        backward(permuted, permuted_probs)
        found.append((permuted, permuted_probs, order, tokens.grad, probs.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gathered_tokens_and_their_gradients_are_megatrons_bit_for_bit() -> None:
    found = []
    for postprocess in (token_permutation._gathered_to_local_experts, token_permutation._postprocess):
        tokens, routing_map, probs = routed()
        dispatcher = gathering(routing_map)
        permuted, tokens_per_expert, permuted_probs = postprocess(dispatcher, tokens, probs)
        backward(permuted, permuted_probs)
        mapping = dispatcher.reversed_local_input_permutation_mapping
        found.append((permuted, tokens_per_expert, permuted_probs, mapping, dispatcher.local_map, tokens.grad, probs.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_megatrons_dispatchers_use_it() -> None:
    assert mcore.TopKRouter.__module__ == "megatron.core.transformer.moe.router"
    assert token_permutation.token_dispatcher.permute is token_permutation.permute
    assert token_permutation.MoEAllGatherTokenDispatcher.dispatch_postprocess is token_permutation._gathered_to_local_experts


def test_no_length_is_asked_of_the_device() -> None:
    with torch.no_grad(), FakeTensorMode():
        tokens = torch.empty(NUM_TOKENS, HIDDEN)
        routing_map = torch.empty(NUM_TOKENS, NUM_EXPERTS, dtype=torch.bool)
        probs = torch.empty(NUM_TOKENS, NUM_EXPERTS)
        permuted, permuted_probs, _ = token_permutation.permute(tokens, routing_map, probs=probs, num_out_tokens=100)
        assert (permuted.shape, permuted_probs.shape) == ((100, HIDDEN), (100,))
        with pytest.raises(DynamicOutputShapeException):
            probs.masked_select(routing_map)
