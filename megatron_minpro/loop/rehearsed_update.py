"""The optimizer step that a rehearsal takes (parallel/rehearsal): the run's own, with a batch that nobody sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_minpro.loop.update import train_mini_batch
from megatron_minpro.objectives import make_objective
from parallel.actor import MegatronActor
from parallel.packing import TokenSequence


def update(
    actor: MegatronActor, sequences: Sequence[TokenSequence], *, learning_rate: float, name: str, options: Mapping[str, Any]
) -> None:
    """Train one mini-batch for the objective of that name with those options."""
    train_mini_batch(actor, sequences, make_objective(name, **options), lag=0, learning_rate=learning_rate)
