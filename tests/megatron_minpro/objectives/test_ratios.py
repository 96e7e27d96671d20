"""The ratio at the bounds of its logarithm, on every torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_minpro.objectives.ratios import MAX_LOG_RATIO, ratio

ABOVE = math.nextafter(MAX_LOG_RATIO, math.inf)


def _clamp_of_torch_2_14(x: Tensor, low: float, high: float) -> Tensor:
    """torch.Tensor.clamp, with the gradient that torch 2.14.1 gives on a bound: 0."""
    inside = (x > low) & (x < high)
    return torch.where(inside, x, torch.minimum(torch.maximum(x.detach(), x.new_tensor(low)), x.new_tensor(high)))


@pytest.mark.parametrize("clamp", [torch.Tensor.clamp, _clamp_of_torch_2_14], ids=["installed", "2.14"])
def test_ratio_has_its_gradient_on_its_bounds_and_none_beyond(clamp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "clamp", clamp)
    log_ratio_T = torch.tensor([-ABOVE, -MAX_LOG_RATIO, 0.0, MAX_LOG_RATIO, ABOVE], dtype=torch.float64, requires_grad=True)
    ratio_T = ratio(log_ratio_T)
    ratio_T.sum().backward()
    expected = [math.exp(-20), math.exp(-20), 1.0, math.exp(20), math.exp(20)]
    torch.testing.assert_close(ratio_T, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(log_ratio_T.grad, torch.tensor([0.0, *expected[1:4], 0.0], dtype=torch.float64))
