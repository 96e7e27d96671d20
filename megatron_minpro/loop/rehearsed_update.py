"""The optimizer step that a rehearsal takes (parallel/rehearsal): the run's own, with a batch that nobody sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_minpro.loop.update import train_mini_batch
from megatron_minpro.objectives import Objective, make_objective
from parallel.actor import MegatronActor
from parallel.packing import TokenSequence


def update(
    actor: MegatronActor, sequences: Sequence[TokenSequence], *, learning_rate: float, name: str, options: Mapping[str, Any]
) -> None:
    """Train one mini-batch for the objective of that name with those options."""
    objective = make_objective(name, **options)
    train_mini_batch(actor, with_entropies(sequences, objective), objective, lag=0, learning_rate=learning_rate)


def with_entropies(sequences: Sequence[TokenSequence], objective: Objective) -> Sequence[TokenSequence]:
    """Sequences that nobody sampled, with the sampler's entropies (1 nat) where the objective needs them."""
    if not objective.needs_behaviour_entropies:
        return sequences
    return [
        replace(sequence, streams={**sequence.streams, "behaviour_entropies": torch.ones(sequence.num_positions)}) for sequence in sequences
    ]
