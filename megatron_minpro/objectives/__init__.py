"""Policy objectives: pure functions of a TokenBatch, one file each. `make_objective(name, **options)` gives one by name or import path."""

from megatron_minpro.objectives.base import (
    NonFiniteTokenError,
    Objective,
    ObjectiveOutput,
    TokenBatch,
    with_behaviour_entropies,
    with_minibatch_statistics,
    with_score_centering,
)
from megatron_minpro.objectives.metrics import add_metrics, finalize_metrics
from megatron_minpro.objectives.registry import OBJECTIVES, make_objective

__all__ = [
    "OBJECTIVES",
    "NonFiniteTokenError",
    "Objective",
    "ObjectiveOutput",
    "TokenBatch",
    "add_metrics",
    "finalize_metrics",
    "make_objective",
    "with_behaviour_entropies",
    "with_minibatch_statistics",
    "with_score_centering",
]
