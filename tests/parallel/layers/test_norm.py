"""RMSNorm against transformers' own in the same dtype, and against autograd of the formula in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from parallel.layers.norm import RMSNorm
from parallel.mcore import TransformerConfig

EPS = 1e-3


def build(size: int, dtype: torch.dtype) -> RMSNorm:
    config = TransformerConfig(num_layers=1, hidden_size=size, num_attention_heads=1, use_cpu_initialization=True, params_dtype=dtype)
    norm = RMSNorm(config, size, eps=EPS)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("shape", [(7, 1, 16), (5, 1, 3, 8)])
def test_values_and_gradients_equal_the_formula_in_float64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = build(shape[-1], torch.float32)
    x = torch.randn(shape, generator=generator).requires_grad_()
    grad = torch.randn(shape, generator=generator)
    out = norm(x)
    out.backward(grad)

    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    expected.backward(grad.double())
    for mine, theirs in ((out.detach(), expected.detach()), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_rounds_where_transformers_rounds() -> None:
    norm, theirs = build(64, torch.bfloat16), Qwen3MoeRMSNorm(64, eps=EPS).bfloat16()
    theirs.load_state_dict({"weight": norm.weight.detach()})
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    # A last bit of the fp32 statistics may tip a rounding, rarely.
    assert (norm(x) == theirs(x)).double().mean() > 0.999


def test_a_strided_input_is_no_different() -> None:
    norm = build(8, torch.float32)
    wide = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    part = wide[:, 8:16].requires_grad_()
    whole = part.detach().clone().requires_grad_()
    for x in (part, whole):
        norm(x).square().sum().backward()
    torch.testing.assert_close(part.grad, whole.grad)
