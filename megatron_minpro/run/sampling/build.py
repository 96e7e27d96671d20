"""The sampler that a run's configuration describes, in two steps: what needs no server, then the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.policy_folder import load_tokenizer
from megatron_minpro.batch.folders import ROUTING_FOLDER
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.batch.routing_file import RoutingAppender
from megatron_minpro.batch.top_tokens_file import TopTokensAppender
from megatron_minpro.config import RunConfig
from megatron_minpro.data.end_tokens import end_token_ids
from megatron_minpro.data.prompts import PromptCursor
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.environments.environment import make_environment
from megatron_minpro.loop.collector import Collector
from megatron_minpro.loop.held_out import held_out_prompts
from megatron_minpro.loop.responder import Responder
from megatron_minpro.loop.sampler import LocalSampler
from megatron_minpro.objectives.advantages import make_advantages
from megatron_minpro.rewards.registry import make_reward
from megatron_minpro.run.server_limits import progress_timeout_s
from megatron_minpro.tracking.rollout_log import RolloutLog
from rollout.client import GenerationClient
from rollout.rolling_gate import Give
from rollout.sglang.server import read_key

log = logging.getLogger(__name__)

_MAX_IN_FLIGHT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is loaded while the ranks build the model and the servers start."""

    tokenizer: Any
    cursor: PromptCursor
    held_out: Sequence[Prompt]


def load(config: RunConfig) -> Prompts:
    """Tokenizer and prompts. Raises ValueError for prompts that cannot be used."""
    tokenizer = load_tokenizer(Path(config.model.path))
    source, report = load_prompts(tokenizer=tokenizer, **config.prompts.model_dump())
    log.info("training prompts: %s", report.summary())
    return Prompts(
        tokenizer=tokenizer,
        cursor=PromptCursor(source, seed=config.seed),
        held_out=[] if config.evaluation is None else held_out_prompts(config.evaluation, tokenizer),
    )


def build_sampler(
    prompts: Prompts,
    config: RunConfig,
    run_dir: Path,
    *,
    endpoints: Sequence[str],
    cursor: Mapping[str, Any] | None,
    next_step: int,
    device_type: str,
    give: Give,
) -> LocalSampler:
    """A sampler that continues where a run stands.

    Args:
        prompts: of the run.
        config: of the run.
        run_dir: gets what was sampled, for people; files of `next_step` and later are deleted.
        endpoints: of the servers.
        cursor: state of the prompt cursor in the checkpoint that is continued; None for a fresh run.
        next_step: the global step whose batch comes next.
        device_type: of the ranks and servers: cuda | cpu.
        give: puts weights that rank 0 keeps into one server; used with publish: rolling.

    Raises:
        ValueError: the cursor's state is of other prompts.
    """
    if cursor is not None:
        prompts.cursor.load_state(cursor)
    rollouts = RolloutLog(run_dir) if config.tracking.keep_rollouts else None
    if rollouts is not None:
        rollouts.truncate_after(next_step - 1)
    rollout = config.rollout
    assignment = rollout.assignment or ("fixed" if device_type == "cpu" else "least_outstanding")
    client = GenerationClient(
        endpoints,
        api_key=None if rollout.api_key_path is None else read_key(Path(rollout.api_key_path), name="rollout.api_key_path"),
        request_timeout_s=rollout.request_timeout_s,
        max_retries=rollout.max_retries,
        max_in_flight=_MAX_IN_FLIGHT if rollout.requests_per_server is None else rollout.requests_per_server * len(endpoints),
        # One call per server is fastest and repeatable for short responses; on GPUs a dead server should cost one group, not a batch.
        samples_per_call=None if device_type == "cpu" and assignment == "fixed" else rollout.group_size,
        wait_s=rollout.start_timeout_s,
        hang_s=progress_timeout_s(config),
        give=give if rollout.publish == "rolling" else None,
        assignment=assignment,
    )
    responder = Responder(
        client=client,
        tokenizer=prompts.tokenizer,
        end_ids=end_token_ids(Path(config.model.path), prompts.tokenizer, extra=rollout.end_tokens),
        environment=make_environment(config.environment.name, **config.environment.options),
        reward=make_reward(
            config.reward.name,
            overlong=config.reward.overlong_options,
            concurrency=config.reward.concurrency,
            **config.reward.options,
        ),
    )
    collector = Collector(
        cursor=prompts.cursor,
        responder=responder,
        advantages=make_advantages(config.advantages.estimator, **config.advantages.options),
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        seed=config.seed,
        dynamic_sampling=rollout.dynamic_sampling,
        routing=_routing(config, run_dir),
        top_tokens=_top_tokens(config, run_dir),
    )
    return LocalSampler(config=config, collector=collector, responder=responder, held_out_prompts=prompts.held_out, rollouts=rollouts)


def _routing(config: RunConfig, run_dir: Path) -> Callable[[int], RoutingAppender] | None:
    """Makes the file of a global step's batch, where the experts come from the servers."""
    if config.actor.routing_replay != "server":
        return None
    architecture = read_architecture(Path(config.model.path))
    return lambda step: RoutingAppender(run_dir / ROUTING_FOLDER, architecture, step=step)


def _top_tokens(config: RunConfig, run_dir: Path) -> Callable[[int], TopTokensAppender] | None:
    """Makes the file of a global step's batch, where scores are centred."""
    top_k = config.objective.num_top_tokens
    if not top_k:
        return None
    vocab_size = read_architecture(Path(config.model.path)).vocab_size
    return lambda step: TopTokensAppender(run_dir, top_k=top_k, vocab_size=vocab_size, step=step)
