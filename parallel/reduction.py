"""Sums of metrics over all ranks, in one collective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class MetricSum:
    """Adds up dictionaries of tensors over ranks. Only some ranks contribute; all learn the result.

    The names and shapes are announced once, by source_rank (which always contributes), and must not change afterwards.
    """

    def __init__(self, *, source_rank: int, control_group: dist.ProcessGroup, device: torch.device) -> None:
        self._source_rank = source_rank
        self._control_group = control_group
        self._device = device
        self._schema: list[tuple[str, torch.Size]] | None = None

    def __call__(self, metrics: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """metrics: this rank's share, None for a rank without one. Returns fp64 tensors on the CPU, equal on all ranks.

        Raises ValueError when names or shapes differ from the first call's.
        """
        if self._schema is None:
            announced = [sorted((name, tensor.shape) for name, tensor in metrics.items()) if metrics is not None else None]
            dist.broadcast_object_list(announced, src=self._source_rank, group=self._control_group)
            assert announced[0] is not None
            self._schema = announced[0]
        sizes = [shape.numel() for _, shape in self._schema]
        if metrics is None:
            flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self._device)
        else:
            found = sorted((name, tensor.shape) for name, tensor in metrics.items())
            if found != self._schema:
                raise ValueError(f"metrics changed between mini-batches: {found}, before {self._schema}")
            flat = torch.cat([metrics[name].detach().double().reshape(-1).to(self._device) for name, _ in self._schema])
        dist.all_reduce(flat)
        parts = flat.cpu().split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(self._schema, parts, strict=True)}
