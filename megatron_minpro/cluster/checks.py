"""What is wrong with a configuration, a machine or a job, before a process starts or a GPU is spent. One check is one function.

Every check raises ValueError with one line: the key or file, its value and what was expected. megatron_minpro.run.preflight says which
checks a run passes, and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_config import Architecture, known_keys
from checkpoints_convert.mapping import check_hf_tensors
from checkpoints_convert.safetensors_io import SafetensorsReader
from checkpoints_convert.servable import refuse_tied_experts
from megatron_minpro.cluster.facts import Finding
from megatron_minpro.cluster.paths import key_files, missing_paths
from megatron_minpro.config import RunConfig
from megatron_minpro.data.end_tokens import end_token_ids
from megatron_minpro.data.prompts import PromptCursor
from megatron_minpro.data.rows import check_file, is_file
from megatron_minpro.data.sources import count_questions, load_prompts
from megatron_minpro.loop.held_out import held_out_prompts
from megatron_minpro.registry import nearest
from parallel.capabilities import Capabilities
from parallel.megatron_options import check_effect, check_machine_options
from parallel.routing_replay import check_replay
from rollout.ports import check_port_free
from rollout.sglang.control import ServerRefused, call
from rollout.sglang.environment import default_server_python
from rollout.sglang.route_limits import check_route_limits
from rollout.sglang.server import check_options, read_key
from rollout.sglang.top_token_limits import check_top_token_limits

_ENDPOINT_TIMEOUT_S = 5.0


def check_passed_options(config: RunConfig, *, device: Any) -> None:
    """An unknown option of Megatron or SGLang. Each is asked only if there are any of its own: that takes seconds."""
    if config.megatron:
        from parallel.actor import check_option_names

        check_option_names(config.megatron)
    if config.sglang:
        check_options(config.sglang, device=device)


def check_architecture(config: RunConfig, architecture: Architecture) -> None:
    """A layout that the model does not fit, an option that changes it, responses longer than its positions."""
    refuse_tied_experts(architecture, source=f"model.path {config.model.path}")
    config.layout.check_model(architecture)
    check_effect(config.megatron, architecture, recompute=config.actor.recompute)
    check_routing_replay(config, architecture)
    check_score_centering(config, architecture)
    prompt = max(prompts.max_prompt_tokens for prompts in config.prompt_sections.values())
    if prompt + config.rollout.max_new_tokens > architecture.max_position_embeddings:
        raise ValueError(
            f"rollout.max_new_tokens: responses of {config.rollout.max_new_tokens} after prompts of up to {prompt} "
            f"tokens exceed the model's {architecture.max_position_embeddings} positions"
        )


def check_routing_replay(config: RunConfig, architecture: Architecture) -> None:
    """Experts that could not be replayed in every pass."""
    replay = config.actor.routing_replay
    if replay == "none":
        return
    try:
        check_replay(config.megatron, architecture)
        if replay == "server":
            check_route_limits(config.sglang)
    except ValueError as error:
        raise ValueError(f"actor.routing_replay = {replay!r}: {error}") from error


def check_score_centering(config: RunConfig, architecture: Architecture) -> None:
    """More tokens than there are, and options of the servers under which their log-probs are not those that tokens are drawn with."""
    centering = config.objective.score_centering
    if centering is None:
        return
    if centering.top_k > architecture.vocab_size:
        raise ValueError(
            f"objective.score_centering.top_k = {centering.top_k}: expected at most {architecture.vocab_size}, the model's vocab_size"
        )
    try:
        check_top_token_limits(config.sglang)
    except ValueError as error:
        raise ValueError(f"objective.score_centering = {centering.model_dump()}: {error}") from error


def check_endpoints(config: RunConfig) -> None:
    """A server that runs already and cannot return what the run asks for. One that does not answer yet says so itself, later."""
    if config.actor.routing_replay != "server":
        return
    path = config.rollout.api_key_path
    key = None if path is None else read_key(Path(path), name="rollout.api_key_path")
    for endpoint in config.rollout.endpoints:
        try:
            arguments = call(endpoint, "/server_info", key=key, timeout_s=_ENDPOINT_TIMEOUT_S)
        except ServerRefused:
            continue
        if isinstance(arguments, dict) and arguments.get("enable_return_routed_experts") is False:
            raise ValueError(
                f"rollout.endpoints: {endpoint} returns no experts, expected a server with --enable-return-routed-experts, as minpro serve "
                "starts it with actor.routing_replay = 'server'"
            )


def check_model(config: RunConfig) -> None:
    """Neither a model nor a recipe for one."""
    folder = Path(config.model.path)
    if not folder.exists() and config.model.warm_up is None:
        raise ValueError(f"model.path: {folder} does not exist and model.warm_up is null; expected a Hugging Face model folder")


def check_warm_up(config: RunConfig) -> None:
    """A field of the architecture to be made that no configuration of these models has, or a tokenizer folder that is not there."""
    warm_up = config.model.warm_up
    if warm_up is None:
        return
    for key in warm_up.architecture:
        if key not in known_keys():
            raise ValueError(f"model.warm_up.architecture.{key}: no field of Qwen3's configuration; {nearest(key, known_keys())}")
    folder = warm_up.tokenizer.folder
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"model.warm_up.tokenizer.folder: {folder} does not exist; expected a folder with a tokenizer")


def check_weights(folder: Path, architecture: Architecture) -> None:
    """Weights that are missing, truncated or of another model, from the files' headers alone."""
    with SafetensorsReader(folder) as reader:
        check_hf_tensors(architecture, {name: reader.shape(name) for name in reader.names}, source=folder)


def check_tokenizer(tokenizer: Any, *, vocab_size: int, source: str) -> None:
    """A tokenizer that has more tokens than the model.

    Args:
        tokenizer: of the model folder.
        vocab_size: rows of the model's embedding. There may be more of them than tokens.
        source: names the model in the error.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens, vocab_size is {vocab_size}; expected the model's own tokenizer"
        )


def check_end_tokens(config: RunConfig, folder: Path, tokenizer: Any) -> None:
    """An end token that is unknown, or that is an ordinary word in this tokenizer, which is then another model's."""
    for token_id in end_token_ids(folder, tokenizer, extra=()):
        if token_id not in tokenizer.added_tokens_decoder:
            what = f"the word {tokenizer.decode([token_id])!r}" if token_id < len(tokenizer) else f"beyond its {len(tokenizer)} tokens"
            raise ValueError(f"{folder}: the end token {token_id} is {what} in the tokenizer; expected the model's own tokenizer")
    end_token_ids(folder, tokenizer, extra=config.rollout.end_tokens)


def check_machine(config: RunConfig, capabilities: Capabilities) -> None:
    """This one machine cannot hold the servers and ranks that it would start, or lacks what an option needs."""
    check_machine_options(config.megatron, capabilities.choose_layers(config.actor.layers))
    servers, tp = config.rollout.servers, config.rollout.tp
    if servers:
        default_server_python()
    if config.rollout.base_port is not None:
        for number in range(servers):
            check_port_free(config.rollout.host, config.rollout.base_port + number)
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


def check_key_files(config: RunConfig) -> None:
    """A key file that is missing, empty, or has several lines."""
    for name, path in key_files(config).items():
        read_key(Path(path), name=name)


def check_prompt_files(config: RunConfig) -> None:
    """A prompt file that is not there, or of a kind that is not read."""
    for section, prompts in config.prompt_sections.items():
        if is_file(prompts.source):
            check_file(prompts.source, key=f"{section}.source")


def check_prompts(config: RunConfig, section: str, tokenizer: Any, *, dealt: Mapping[str, Any] | None) -> None:
    """Rows without a question or an answer, limits that leave too few prompts, other rows than those dealt. Reads the source once.

    Args:
        config: the run.
        section: prompts or evaluation.prompts.
        tokenizer: of the model.
        dealt: where the run's cursor stood at the checkpoint that it continues from; None for a fresh run.
    """
    if section == "prompts":
        source, _ = load_prompts(tokenizer=tokenizer, **config.prompts.model_dump())
        _check_enough(config, len(source), source.name)
        if dealt is not None:
            PromptCursor(source, seed=config.seed).load_state(dealt)
    elif config.evaluation is not None:
        held_out_prompts(config.evaluation, tokenizer)


def check_rows(config: RunConfig, section: str) -> None:
    """What check_prompts finds without a tokenizer, in a file."""
    prompts = config.prompt_sections[section]
    found = count_questions(**prompts.model_dump())
    if section == "prompts":
        _check_enough(config, found, prompts.source)


def _check_enough(config: RunConfig, found: int, name: str) -> None:
    needed = config.rollout.prompts_per_step
    if found < needed:
        raise ValueError(f"prompts.source: {name} has {found} prompts, expected at least rollout.prompts_per_step = {needed}")


def examine_config(config: RunConfig) -> list[Finding]:
    """What a run needs of this machine: its files, and a run folder that can be written to (once there is one)."""
    lines = missing_paths(config)
    findings = [Finding(subject=line.partition(":")[0], verdict="missing", detail=line.partition(": ")[2]) for line in lines]
    return findings or [Finding(subject="run", verdict="ok", detail=f"{config.name}: its files are here")]
