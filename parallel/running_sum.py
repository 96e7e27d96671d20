"""Running sums whose result never depends on timing. CUDA's own of floating-point numbers does, and raises where that is forbidden."""

from __future__ import annotations

import torch
from torch import Tensor

_ROW = 256


def running_sum(x_N: Tensor) -> Tensor:
    """Inclusive running sum in float64: [N] -> float64 [N].

    On CUDA numbers lie in rows of 256: a product with a triangle of ones sums inside the rows, and the sum of the rows before comes on
    top, found the same way. It takes log(N) / log(256) rounds of three kernels.
    """
    if not x_N.is_cuda:
        return x_N.cumsum(0, dtype=torch.float64)
    return running_sum_by_rows(x_N)


def running_sum_by_rows(x_N: Tensor) -> Tensor:
    """What `running_sum` does on CUDA, on any device."""
    num_rows = -(-len(x_N) // _ROW)
    x_RC = x_N.new_zeros(num_rows * _ROW, dtype=torch.float64)
    x_RC[: len(x_N)] = x_N
    triangle_CC = torch.ones(_ROW, _ROW, dtype=torch.float64, device=x_N.device).triu_()
    sum_RC = x_RC.view(num_rows, _ROW) @ triangle_CC
    if num_rows > 1:
        sum_RC[1:] += running_sum_by_rows(sum_RC[:, -1])[:-1, None]
    return sum_RC.view(-1)[: len(x_N)]
