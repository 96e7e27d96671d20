"""Running sums without CUDA's cumsum, against exact sums of fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import pytest
import torch

from parallel.running_sum import running_sum, running_sum_by_rows


@pytest.mark.parametrize("length", [1, 5, 256, 257, 1000, 70_000])  # the last in three rounds
def test_sums_by_rows_are_exact_to_rounding(length: int) -> None:
    x = torch.randn(length, generator=torch.Generator().manual_seed(0)) * 3
    exact = torch.tensor([float(total) for total in accumulate(Fraction(value) for value in x.tolist())], dtype=torch.float64)
    bound = 1e-15 * float(x.abs().sum())
    for found in (running_sum_by_rows(x), running_sum(x)):
        assert (found.dtype, found.shape) == (torch.float64, x.shape)
        assert float((found - exact).abs().max()) <= bound
