"""Operators that are one kernel on CUDA and that a torch built for CPUs computes from others: several kernels, with temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("aten", "IMPL")  # what it registers lasts as long as it does


def install() -> None:
    """Make them one kernel for fake CUDA tensors, for the rest of the process."""
    _library.impl("silu_backward", _silu_backward, "CUDA")


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Only its being there counts: fake tensors ask for the shape, by the operator's own rule."""
    return torch.empty_like(x)
