"""The table of objectives and `make_objective`. A new objective is one function in its own file, one line here, one test."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from megatron_minpro.objectives.base import Objective, ObjectiveOutput, TokenBatch
from megatron_minpro.objectives.cispo import cispo, scaled_cispo
from megatron_minpro.objectives.ctpo import ctpo
from megatron_minpro.objectives.grpo import grpo
from megatron_minpro.objectives.gspo import gspo
from megatron_minpro.objectives.m2po import m2po, m2po_statistics
from megatron_minpro.objectives.minpro import minpro
from megatron_minpro.objectives.prefix_filter import prefix_filter, prefix_filter_statistics
from megatron_minpro.objectives.prefix_ratio import prefix_ratio
from megatron_minpro.objectives.reinforce import reinforce
from megatron_minpro.objectives.topr import topr
from megatron_minpro.registry import nearest
from parallel.sequence_shard import SequenceShard

OBJECTIVES: Mapping[str, Callable[..., ObjectiveOutput]] = MappingProxyType(
    {
        "minpro": minpro,
        "cispo": cispo,
        "scaled_cispo": scaled_cispo,
        "grpo": grpo,
        "gspo": gspo,
        "m2po": m2po,
        "ctpo": ctpo,
        "topr": topr,
        "prefix_ratio": prefix_ratio,
        "prefix_filter": prefix_filter,
        "reinforce": reinforce,
    }
)

# What an objective must know of the whole mini-batch before any gradient, as a sum over batches.
MINIBATCH_STATISTICS: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {"m2po": m2po_statistics, "prefix_filter": prefix_filter_statistics}
)


def make_objective(name: str, **options: object) -> Objective:
    """The objective of that name with these options; what is left out takes the published default in the objective function's signature.

    Raises ValueError, with the nearest known one, for an unknown name or option; and for an option that is missing or out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; {nearest(str(name), OBJECTIVES)}")
    function = OBJECTIVES[name]
    known = {p.name: p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for option in options:
        if option not in known:
            raise ValueError(f"objective {name!r} has no option {option!r}; {nearest(option, known)}")
    missing = [option for option, p in known.items() if p.default is inspect.Parameter.empty and option not in options]
    if missing:
        raise ValueError(f"objective {name!r} needs option {missing[0]!r}, which has no published default")
    complete = {option: options.get(option, p.default) for option, p in known.items()}
    objective = Objective(
        name=name, options=MappingProxyType(complete), function=function, statistics_function=MINIBATCH_STATISTICS.get(name)
    )
    _try_options(objective)
    return objective


def _try_options(objective: Objective) -> None:
    """Run on one token: each function checks its own options, and a wrong one must be found now, not in the first update."""
    zero = torch.zeros(1)
    batch = TokenBatch(
        logprobs_T=zero,
        behaviour_logprobs_T=zero,
        advantages_T=zero,
        loss_mask_T=torch.ones(1, dtype=torch.bool),
        shard=SequenceShard.whole([1]),
        global_tokens=1,
        global_sequences=1,
    )
    try:
        statistics = objective.minibatch_statistics(batch) if objective.needs_minibatch_statistics else None
        objective(batch, statistics)
    except ValueError as error:
        raise ValueError(f"objective {objective.name!r}: {error}") from error
