"""What can be known to be wrong before a process starts or a GPU is spent."""

from __future__ import annotations

from pathlib import Path

from checkpoints_convert.hf_config import Architecture, read_architecture
from megatron_minpro.config import RunConfig
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.loop.held_out import held_out_prompts
from megatron_minpro.run import base_model
from megatron_minpro.run.serving import check_server_options
from parallel.actor import check_option_names
from parallel.capabilities import Capabilities
from parallel.model import check_machine_options
from rollout.sglang.server import default_server_python


def check_settings(config: RunConfig) -> Architecture | None:
    """Everything that needs neither the machine nor the prompts. The model's architecture, None where it is not known yet.

    Raises ValueError for a layout that the model does not fit, responses longer than its positions, unknown Megatron or SGLang options.
    """
    check_option_names(config.megatron)
    check_server_options(config)
    architecture = _known_architecture(config)
    if architecture is not None:
        config.layout.check_model(architecture)
        prompt = max(config.prompts.max_prompt_tokens, config.evaluation.prompts.max_prompt_tokens)
        if prompt + config.rollout.max_new_tokens > architecture.max_position_embeddings:
            raise ValueError(
                f"rollout.max_new_tokens: responses of {config.rollout.max_new_tokens} after prompts of up to {prompt} "
                f"tokens exceed the model's {architecture.max_position_embeddings} positions"
            )
    return architecture


def _known_architecture(config: RunConfig) -> Architecture | None:
    folder, warm_up = Path(config.model.path), config.model.warm_up
    if folder.exists():
        base_model.check_recipe(config.model, config.prompts)
        return read_architecture(folder)
    if warm_up is None:
        return None
    # A tokenizer that is yet to be made decides the vocabulary; everything else can be checked with a stand-in for it.
    return Architecture.from_config({"vocab_size": config.parallel.tp, **warm_up.architecture}, source="model.warm_up.architecture")


def check_model(config: RunConfig) -> None:
    """Raises ValueError when there is neither a model nor a recipe for one."""
    folder = Path(config.model.path)
    if not folder.exists() and config.model.warm_up is None:
        raise ValueError(f"model.path: {folder} does not exist and model.warm_up is null; expected a Hugging Face model folder")


def check_machine(config: RunConfig, capabilities: Capabilities) -> None:
    """Raises ValueError when this one machine cannot hold the servers and ranks it would start, or lacks what an option needs."""
    check_machine_options(config.megatron, capabilities)
    servers, tp = config.rollout.servers, config.rollout.tp
    if servers:
        default_server_python()
    if capabilities.device_type == "cpu":
        if servers and tp != 1:
            raise ValueError(f"rollout.tp: {tp}, expected 1 on a CPU")
        return
    needed = config.world_size + servers * tp
    if needed > capabilities.cuda_devices:
        raise ValueError(
            f"world_size: {config.world_size} ranks and {servers} servers of {tp} GPUs need {needed}, this machine has "
            f"{capabilities.cuda_devices}; expected fewer, or slurm/ for several machines"
        )


def check_prompts(config: RunConfig) -> None:
    """Read both prompt sources once. Raises ValueError naming file, row and field, or the limit that leaves no prompt."""
    with base_model.tokenizer_of(config.model, config.prompts) as tokenizer:
        load_prompts(tokenizer=tokenizer, **config.prompts.model_dump())
        held_out_prompts(config.evaluation, tokenizer)
