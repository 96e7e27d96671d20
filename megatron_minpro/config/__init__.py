"""The run's configuration: typed, frozen, validated; YAML files plus key=value overrides."""

from megatron_minpro.config.loading import ConfigError, dump_config, flatten_differences, load_config
from megatron_minpro.config.run_config import RunConfig
from megatron_minpro.config.sections import (
    ActorConfig,
    AdvantagesConfig,
    CheckpointConfig,
    CorrectionsConfig,
    DebugConfig,
    DynamicSamplingConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    TrackingConfig,
    WarmUpConfig,
)

__all__ = [
    "ActorConfig",
    "AdvantagesConfig",
    "CheckpointConfig",
    "ConfigError",
    "CorrectionsConfig",
    "DebugConfig",
    "DynamicSamplingConfig",
    "EvaluationConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrackingConfig",
    "WarmUpConfig",
    "dump_config",
    "flatten_differences",
    "load_config",
]
