"""Both ways to multiply all experts against float64 loops over tokens, and the module against Megatron-Core's own."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import capabilities
from parallel.layers.experts import PackedExperts, Product, grouped_linear, loop_linear, weighted_swiglu
from parallel.mcore import ColumnParallelLinear, MLPSubmodules, RowParallelLinear, SequentialMLP, TransformerConfig

COUNTS = [(3, 0, 7, 1), (0, 0, 11, 0), (0, 0, 0, 0), (5,)]
INPUTS, OUTPUTS = 12, 20


def problem(counts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Tokens sorted by expert, counts, weights and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(counts)
    tokens = torch.randn(num_tokens, INPUTS, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(OUTPUTS, INPUTS, generator=generator).to(dtype).requires_grad_() for _ in counts]
    return tokens, torch.tensor(counts), weights, torch.randn(num_tokens, OUTPUTS, generator=generator).to(dtype)


def multiply(product: Product, tokens: Tensor, counts: Tensor, weights: list[Tensor]) -> Tensor:
    if product == "grouped":
        return grouped_linear(tokens, counts, weights)
    return loop_linear(tokens, counts, weights, into_main_grad=False)


@pytest.mark.parametrize("product", ["loop", "grouped"])
@pytest.mark.parametrize("counts", COUNTS)
def test_every_token_meets_its_experts_weight_and_gradients_follow(product: Product, counts: tuple[int, ...]) -> None:
    tokens, counts_E, weights, grad = problem(counts)
    out = multiply(product, tokens, counts_E, weights)
    out.backward(grad)

    expert_of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    expected_weight_grads = [torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64) for _ in counts]
    for token, expert in enumerate(expert_of):
        x, g, weight = tokens.detach()[token].double(), grad[token].double(), weights[expert].detach().double()
        torch.testing.assert_close(out[token].detach().double(), weight @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens.grad[token].double(), weight.t() @ g, rtol=1e-5, atol=1e-5)
        expected_weight_grads[expert] += torch.outer(g, x)
    for weight, expected in zip(weights, expected_weight_grads, strict=True):
        torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_megatrons_buffer_and_say_so(dtype: torch.dtype) -> None:
    tokens, counts, weights, grad = problem(COUNTS[0], dtype)
    for weight in weights:
        weight.main_grad = torch.full((OUTPUTS, INPUTS), 0.5)
        weight.grad_added_to_main_grad = False
    for _ in range(2):
        loop_linear(tokens, counts, weights, into_main_grad=True).backward(grad)
    parts = zip(weights, grad.split(COUNTS[0]), tokens.detach().split(COUNTS[0]), strict=True)
    for weight, g, x in parts:
        torch.testing.assert_close(weight.main_grad.double(), 0.5 + 2 * (g.double().t() @ x.double()), rtol=1e-5, atol=1e-5)
        assert weight.grad_added_to_main_grad
        assert weight.grad is not None  # Megatron's overlapped reduction asks for one, and drops it


def test_the_gated_activation_and_its_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    probs = torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_()
    gate, up = hidden.detach()[:, :3], hidden.detach()[:, 3:]
    expected = gate / (1 + torch.exp(-gate)) * up * probs.detach()[:, None]
    torch.testing.assert_close(weighted_swiglu(hidden, probs).detach(), expected)
    assert torch.autograd.gradcheck(weighted_swiglu, (hidden, probs))


def build(kind: type[SequentialMLP], group: dist.ProcessGroup, *, fusion: bool = False, **options: object) -> SequentialMLP:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        ffn_hidden_size=40,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_ffn_hidden_size=8,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=fusion,
    )
    groups = SimpleNamespace(ep=group, expt_tp=group, expt_dp=group)
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    torch.manual_seed(0)
    return kind(4, config, submodules, pg_collection=groups, **options)


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("product", ["loop", "grouped"])
def test_the_module_equals_megatrons_own_with_the_same_parameters(
    one_rank_group: dist.ProcessGroup, product: Product, fusion: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = build(SequentialMLP, one_rank_group)
    ours = build(PackedExperts, one_rank_group, product=product, fusion=fusion)
    ours.load_state_dict(theirs.state_dict())  # by name
    counts = torch.tensor(COUNTS[0])
    results = []
    for module in (theirs, ours):
        generator.manual_seed(1)
        tokens = torch.randn(11, INPUTS, generator=generator).requires_grad_()
        probs = torch.rand(11, generator=generator).requires_grad_()
        out, bias = module(tokens, counts, probs)
        assert bias is None
        out.backward(torch.randn(11, INPUTS, generator=generator))
        # An expert without tokens has no gradient at all in Megatron's loop, and zeros here.
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in module.parameters()]
        results.append([out.detach(), tokens.grad, probs.grad, *grads])
    for mine, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_the_checkpoint_has_megatrons_own_keys_and_shapes(one_rank_group: dist.ProcessGroup) -> None:
    def keys(module: SequentialMLP) -> dict[str, tuple[object, ...]]:
        metadata = {"dp_cp_group": one_rank_group}
        state = module.sharded_state_dict(prefix="experts.", metadata=metadata)
        return {name: (shard.key, shard.replica_id) for name, shard in state.items()}

    assert keys(build(PackedExperts, one_rank_group, product="loop")) == keys(build(SequentialMLP, one_rank_group))


def test_the_grouped_product_is_for_cuda() -> None:
    here = dataclasses.replace(capabilities.detect(), cuda_devices=0)
    on_cuda = dataclasses.replace(here, cuda_devices=8)
    assert here.expert_product(torch.bfloat16) == here.expert_product(torch.float32) == "loop"
    assert on_cuda.expert_product(torch.bfloat16) == "grouped"
    assert on_cuda.expert_product(torch.float32) == "loop"  # the rehearsal: torch's grouped product takes bfloat16 alone
