"""How many tokens each expert, and each expert-parallel rank, gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from parallel.layout import ParallelLayout
from parallel.mcore import TopKRouter

# Shapes: E experts, P expert-parallel ranks.
RoutedTokens = tuple[int, Tensor]  # layer number, int64 [E] on the CPU: tokens of one rank and micro-batch, by expert


@contextmanager
def record_routing() -> Iterator[list[RoutedTokens]]:
    """What this rank's routers decide while the context is open, in order: one entry per layer and micro-batch, padding included."""
    routed: list[RoutedTokens] = []

    def remember(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, TopKRouter):
            routed.append((module.layer_number, output[1].sum(0).cpu()))

    hook = register_module_forward_hook(remember)
    try:
        yield routed
    finally:
        hook.remove()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoad:
    """Tokens over all layers and micro-batches. rank_imbalance: busiest expert-parallel rank over the mean one, weighted by tokens."""

    expert_max: int
    expert_mean: float
    rank_imbalance: float


def dispatched(by_rank: Mapping[int, Sequence[RoutedTokens]], layout: ParallelLayout) -> list[Tensor]:
    """Tokens [E] that meet in one dispatch: those of all ranks that share experts, per layer and micro-batch. by_rank: of every rank."""
    together: dict[tuple[int, int], list[int]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        together.setdefault((place.pp, place.edp), []).append(rank)
    found = []
    for ranks in together.values():
        for entries in zip(*(by_rank[rank] for rank in ranks), strict=True):
            assert len({layer for layer, _ in entries}) == 1, "ranks that share experts work on one layer at a time"
            found.append(torch.stack([tokens for _, tokens in entries]).sum(0))
    return found


def load_of(dispatches: Sequence[Tensor], *, ep: int) -> ExpertLoad:
    """dispatches: [E] each, of `dispatched`. Rank p of ep holds the experts p * E / ep and following."""
    all_E = torch.stack(list(dispatches)).double()
    by_rank_P = all_E.view(len(all_E), ep, -1).sum(2)
    return ExpertLoad(
        expert_max=int(all_E.max()),
        expert_mean=float(all_E.mean()),
        rank_imbalance=float(by_rank_P.max(1).values.sum() / by_rank_P.mean(1).sum()),
    )
