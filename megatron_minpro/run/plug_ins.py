"""The second step of checking a configuration: what its names and options lead to. Imports torch and the user's own modules."""

from __future__ import annotations

from megatron_minpro.config import RunConfig, located
from megatron_minpro.data.sources import check_prompts
from megatron_minpro.environments.environment import make_environment
from megatron_minpro.loop.learning_rate import check_reported
from megatron_minpro.objectives import make_objective
from megatron_minpro.objectives.advantages import make_advantages
from megatron_minpro.objectives.registry import check_score_centering
from megatron_minpro.registry import PlugInError
from megatron_minpro.rewards.registry import make_reward
from megatron_minpro.run import base_model
from megatron_minpro.run.weight_sync import weight_plug_ins
from megatron_minpro.tracking.tracker import make_tracker


def check_plug_ins(config: RunConfig) -> None:
    """Find every plug-in that the configuration names, and check its options. Called before anything starts.

    Raises:
        ConfigError: a plug-in is missing, not callable, or refuses an option; one line with file, line, setting, value and reason.
    """
    try:
        objective = make_objective(config.objective.name, **config.objective.options)
        if config.objective.score_centering is not None:
            check_score_centering(objective)
        if config.actor.optimizer.sample_size is not None:
            check_reported(config.actor.optimizer.sample_size, objective)
        make_advantages(config.advantages.estimator, **config.advantages.options)
        make_environment(config.environment.name, **config.environment.options)
        make_reward(config.reward.name, overlong=config.reward.overlong_options, **config.reward.options).close()
        for section, prompts in config.prompt_sections.items():
            check_prompts(section=section, **prompts.model_dump())
        for tracker in config.tracking.trackers:
            make_tracker(tracker, config.run_dir)
        weight_plug_ins(config).find(config.rollout.weight_sync, {}, passed=1)
        if config.model.warm_up is not None:
            base_model.check_plug_ins(config.model.warm_up)
    except PlugInError as error:
        raise located(error, config) from error
