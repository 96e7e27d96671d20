"""The weights of one earlier moment, kept beside the model: a batch is scored under the weights that sampled it while training goes on.

With Megatron's distributed optimizer every parameter is a view into a flat buffer of its model chunk (dense or expert). A snapshot is a
copy of these buffers and nothing else. `swap` exchanges the two, so the model runs under the kept weights and nothing is lost; a second
`swap` restores the model to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from parallel.mcore import DistributedDataParallel

_PIECE = 1 << 24  # elements that are exchanged at a time: one temporary of this size exists
SnapshotPlace = Literal["device", "pinned_host"]


class WeightSnapshot:
    """One rank's part of the weights of one policy version. Not collective; settle overlapped gathers before each call."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], parameters: Mapping[str, Tensor], *, place: SnapshotPlace) -> None:
        """Reserve the memory: the size of the model's parameters on this rank.

        Args:
            chunks: the model chunks of this rank.
            parameters: every parameter of this rank by name.
            place: `device` beside the model, or `pinned_host`: host memory that the GPU can copy to and from.

        Raises:
            ValueError: naming a parameter that lies outside the flat buffers, or weights that share memory with gradients (MXFP8).
        """
        self._live = _parameter_buffers(chunks, parameters)
        pinned = place == "pinned_host" and self._live[0].is_cuda
        device = "cpu" if place == "pinned_host" else None
        self._kept = [torch.empty_like(buffer, device=device, pin_memory=pinned) for buffer in self._live]

    @property
    def num_bytes(self) -> int:
        """Memory that the snapshot takes on this rank."""
        return sum(kept.nbytes for kept in self._kept)

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the weights as they are now."""
        for kept, live in zip(self._kept, self._live, strict=True):
            kept.copy_(live)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the kept ones."""
        for kept, live in zip(self._kept, self._live, strict=True):
            for kept_piece, live_piece in zip(kept.view(-1).split(_PIECE), live.view(-1).split(_PIECE), strict=True):
                former = live_piece.clone()
                live_piece.copy_(kept_piece)
                kept_piece.copy_(former)


def _parameter_buffers(chunks: Sequence[DistributedDataParallel], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    shared = [buffer for buffer in buffers if buffer.param_data is None or _storage(buffer.param_data) == _storage(buffer.grad_data)]
    if shared:
        raise ValueError("megatron.reuse_grad_buf_for_mxfp8_param_ag: weights share memory with gradients; they cannot be kept")
    inside = {_storage(buffer.param_data) for buffer in buffers}
    outside = [name for name, parameter in parameters.items() if _storage(parameter) not in inside]
    if outside:
        raise ValueError(f"{len(outside)} parameters lie outside Megatron's buffers and cannot be kept, the first is {outside[0]}")
    return [buffer.param_data for buffer in buffers]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
