"""`minpro study --smoke`: real runs, as few and as short as they may be while every level of every axis is trained with at least once.

Not every combination is run. Run number i takes level i of each axis, shorter axes from their beginning again, so there are as many runs as
the longest axis has levels: 14 objectives at 3 lags are 14 runs, not 42. A rule of `cells` that none of these runs meets gets one more run.
What is short: two updates a global step, at least two batches and one more than the staleness, four prompts an update or what the
data-parallel ranks need, four held-out prompts, the serial schedule, and at most 60 supervised steps for a base model of the smoke's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_minpro.config import RunConfig
from megatron_minpro.study.definition import Study, levels_of, meets

_UPDATES, _PROMPTS_PER_UPDATE, _HELD_OUT, _WARM_UP = 2, 2, 4, 60


def smoke_study(study: Study) -> Study:
    """The study of the smoke runs: a folder of its own, the first seed."""
    short = study.model_copy(update={"name": f"{study.name}_smoke", "seeds": study.seeds[:1]})
    short.remember(study.origins, study.path)
    return short


def covering(study: Study) -> list[dict[str, str]]:
    """Axis -> level of every smoke run: each level and each rule at least once."""
    names = {axis: [level.name for level in study.levels(axis)] for axis in study.axes}
    longest = max(map(len, names.values()))
    runs = [{axis: levels[number % len(levels)] for axis, levels in names.items()} for number in range(longest)]
    for rule in study.cells:
        if not any(meets(rule.where, run) for run in runs):
            runs.append({axis: levels_of(rule.where[axis])[0] if axis in rule.where else levels[0] for axis, levels in names.items()})
    return runs


def shortened(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Setting -> value of a smoke run.

    Args:
        config: of the cell as it will be.
        folder: of the smoke runs, which holds their base model.
    """
    fewest = -(-config.layout.dp // config.rollout.group_size)  # so that every data-parallel rank gets a response
    settings: dict[str, Any] = {
        "num_global_steps": max(2, config.staleness + 1),
        "rollout.prompts_per_step": _UPDATES * max(_PROMPTS_PER_UPDATE, fewest),
        "actor.updates_per_step": _UPDATES,
        "rollout.publish": "together",
        "schedule": "serial",
        "checkpoint.every": 1_000_000,  # the last step has one
        "tracking.keep_rollouts": False,
        "tracking.token_groups": 0,
        "tracking.report": False,
        "tracking.trackers": [],
        "profile.steps": None,
    }
    if config.evaluation is not None:
        settings |= {"evaluation.every": 0, "evaluation.num_prompts": min(_HELD_OUT, config.evaluation.num_prompts)}
    if config.model.warm_up is not None:
        settings |= {
            "model.path": str(folder / "base_model"),
            "model.warm_up.num_steps": min(_WARM_UP, config.model.warm_up.num_steps),
        }
    return settings
