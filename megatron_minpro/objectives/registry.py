"""The table of objectives and `make_objective`.

An objective is a function `objective(batch, *, options) -> ObjectiveOutput` (see base.py). It lives in this package and has a line in the
table, or it lives in a module of your own and the configuration names it: `objective.name=my_module:my_objective`. An objective that
needs statistics of the whole mini-batch is decorated with `with_minibatch_statistics`, one that needs the sampler's entropies with
`with_behaviour_entropies`, one whose scores can be centred with `with_score_centering`.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import torch

from megatron_minpro.objectives.base import Objective, ObjectiveOutput, TokenBatch
from megatron_minpro.registry import PlugInError, PlugIns
from parallel.sequence_shard import SequenceShard
from parallel.top_tokens import ScoredTopTokens

_FOLDER = "megatron_minpro.objectives"
OBJECTIVES = PlugIns(
    setting="objective.name",
    options="objective",
    known={
        "minpro": f"{_FOLDER}.minpro:minpro",
        "cispo": f"{_FOLDER}.cispo:cispo",
        "scaled_cispo": f"{_FOLDER}.cispo:scaled_cispo",
        "grpo": f"{_FOLDER}.grpo:grpo",
        "gspo": f"{_FOLDER}.gspo:gspo",
        "m2po": f"{_FOLDER}.m2po:m2po",
        "ctpo": f"{_FOLDER}.ctpo:ctpo",
        "topr": f"{_FOLDER}.topr:topr",
        "dppo_tv": f"{_FOLDER}.dppo:dppo_tv",
        "dppo_kl": f"{_FOLDER}.dppo:dppo_kl",
        "cppo": f"{_FOLDER}.cppo:cppo",
        "a3po": f"{_FOLDER}.a3po:a3po",
        "sat": f"{_FOLDER}.sat:sat",
        "estr": f"{_FOLDER}.estr:estr",
        "pnpo": f"{_FOLDER}.pnpo:pnpo",
        "vespo": f"{_FOLDER}.vespo:vespo",
        "sapo": f"{_FOLDER}.sapo:sapo",
        "ema_kpo": f"{_FOLDER}.ema_kpo:ema_kpo",
        "drpo": f"{_FOLDER}.drpo:drpo",
        "prefix_ratio": f"{_FOLDER}.prefix_ratio:prefix_ratio",
        "prefix_filter": f"{_FOLDER}.prefix_filter:prefix_filter",
        "masked_is": f"{_FOLDER}.masked_is:masked_is",
        "reinforce": f"{_FOLDER}.reinforce:reinforce",
    },
)


def make_objective(name: str, **options: object) -> Objective:
    """An objective with all of its options.

    Args:
        name: a key of the table above, or package.module:function.
        options: keyword arguments of the function. What is left out takes the default in its signature, which is the published one.

    Raises:
        PlugInError: the objective or an option is unknown (the message has the nearest known name), missing, or out of range.
    """
    function = OBJECTIVES.load(name)
    statistics_function = getattr(function, "minibatch_statistics", None)
    passed = 1 if statistics_function is None else 2
    OBJECTIVES.check_options(name, function, options, passed=passed)
    objective = Objective(
        name=name,
        options=MappingProxyType(OBJECTIVES.defaults(name, function, passed=passed) | options),
        function=function,
        statistics_function=statistics_function,
        needs_behaviour_entropies=getattr(function, "needs_behaviour_entropies", False),
        centers_scores=getattr(function, "centers_scores", False),
    )
    return replace(objective, metric_names=frozenset(_try_options(objective).metrics))


def check_score_centering(objective: Objective) -> None:
    """Raises PlugInError for an objective whose weight score centering cannot centre (see score_centering.py)."""
    if not objective.centers_scores:
        known = ", ".join(name for name in OBJECTIVES.known if getattr(OBJECTIVES.load(name), "centers_scores", False))
        reason = f"its scores cannot be centred; expected objective.score_centering = null, or one of {known}"
        raise PlugInError(OBJECTIVES.setting, objective.name, reason)
    output = _try_options(objective, top=ScoredTopTokens(logprobs_TK=torch.zeros(1, 1), behaviour_logprobs_TK=torch.zeros(1, 1)))
    if "centering/active" not in output.metrics:
        raise OBJECTIVES.refused(objective.name, ValueError("says that it centres scores and did not; see score_centering.py"))


def _try_options(objective: Objective, top: ScoredTopTokens | None = None) -> ObjectiveOutput:
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
        behaviour_entropies_T=zero,
        lag=0,
        top=top,
    )
    try:
        statistics = objective.minibatch_statistics(batch) if objective.needs_minibatch_statistics else None
        output = objective(batch, statistics)
    except Exception as error:  # a function of the user's own may raise anything
        raise OBJECTIVES.refused(objective.name, error) from error
    if not isinstance(output, ObjectiveOutput):
        raise OBJECTIVES.refused(objective.name, TypeError(f"returned a {type(output).__name__}, expected an ObjectiveOutput"))
    return output
