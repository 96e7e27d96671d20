"""What Megatron-Core lacks on a CPU with gloo, added once Megatron-Core is imported.

1. gloo has no all-gather or reduce-scatter of unequal parts, which the all-to-all dispatcher needs when both expert
   and expert-tensor parallelism are in use: every rank pads to the largest part.
2. gloo copies all gradients and all weights through buffers of its own even where the distributed optimizer has one replica.
3. Apex's kernels that add weight gradients to Megatron's buffer are CUDA, where they are installed. `weight_gradient.py` replaces them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.tensor_parallel import layers, mappings

from parallel import weight_gradient

_gather = mappings._gather_along_first_dim
_reduce_scatter = mappings._reduce_scatter_along_first_dim


def _pad_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    if x.size(0) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - x.size(0), *x.shape[1:])])


def gather_along_first_dim(
    input_: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """All-gather of parts of unequal length: [rows of this rank, ...] -> [rows of all ranks, ...]."""
    if output_split_sizes is None or group.size() == 1:
        return _gather(input_, group, output_split_sizes, use_global_buffer)
    sizes = [int(size) for size in output_split_sizes]
    largest = max(sizes)
    gathered = input_.new_empty((len(sizes) * largest, *input_.shape[1:]))
    dist.all_gather_into_tensor(gathered, _pad_rows(input_, largest), group=group)
    return torch.cat([gathered[i * largest : i * largest + size] for i, size in enumerate(sizes)])


def reduce_scatter_along_first_dim(
    input_: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """Reduce-scatter (sum) of parts of unequal length: [rows of all ranks, ...] -> [rows of this rank, ...]."""
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
    sizes = [int(size) for size in input_split_sizes]
    largest = max(sizes)
    reduced = input_.new_empty((largest, *input_.shape[1:]))
    padded = torch.cat([_pad_rows(part, largest) for part in torch.split(input_, sizes)])
    dist.reduce_scatter_tensor(reduced, padded, group=group)
    return reduced[: sizes[group.rank()]].contiguous()


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, left out where a single rank would send a buffer to itself. Positional: output, input."""

    def run(output: torch.Tensor, input_: torch.Tensor, *, group: dist.ProcessGroup, **options: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == input_.data_ptr():
            return None
        return collective(output, input_, group=group, **options)

    return run


def install() -> None:
    """Idempotent."""
    mappings._gather_along_first_dim = gather_along_first_dim
    mappings._reduce_scatter_along_first_dim = reduce_scatter_along_first_dim
    param_and_grad_buffer.dist_all_gather_func = _unless_alone(dist.all_gather_into_tensor)
    param_and_grad_buffer.dist_reduce_scatter_func = _unless_alone(dist.reduce_scatter_tensor)
    layers.fused_weight_gradient_mlp_cuda = weight_gradient
    layers._grad_accum_fusion_available = True
