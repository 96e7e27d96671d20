"""What a run's configuration says about model, training and work, in the planner's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args

from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.config import RunConfig
from megatron_minpro.registry import nearest
from parallel.planner.hardware import Hardware
from parallel.planner.lengths import Lengths, exponential
from parallel.planner.models import find_shape
from parallel.planner.plan import Work
from parallel.planner.sampling import Rollouts
from parallel.planner.shape import ModelShape
from parallel.planner.training import CUDA_GRAPHS, DISPATCHERS, PRECISIONS, RECOMPUTES, SPECS, Training

# What --search finds, with the values from which it starts.
SEARCHED = {
    **{f"parallel.{axis}": "1" for axis in ("tp", "pp", "cp", "ep", "etp")},
    **{f"parallel.{key}": "null" for key in ("vpp", "dp", "layers_in_first_stage", "layers_in_last_stage", "layers_per_stage")},
    **{f"parallel.{key}": "false" for key in ("count_embedding_as_layer", "count_loss_as_layer")},
}
Recipe = Literal["run", "fastest"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)


def check_used(used: bool, options: Mapping[str, object | None], why: str) -> None:
    """Raises ValueError for an option that was given (is not None) though nothing would come of it."""
    for name, value in options.items():
        if value is not None and not used:
            raise ValueError(f"{name} {why}")


def recipe_of(name: str | None) -> Recipe:
    """The recipe that --recipe names. Raises ValueError for another word."""
    for recipe in RECIPES:
        if name in (None, recipe):
            return recipe
    raise ValueError(f"--recipe: {name!r} is not known; {nearest(str(name), RECIPES)}")


def shape_of(run: RunConfig) -> ModelShape:
    """The configured model's sizes. Raises ValueError when they are neither on this machine nor shipped."""
    return find_shape(run.model.path, architecture=None if run.model.warm_up is None else run.model.warm_up.architecture)


def training_of(run: RunConfig, machine: Hardware, choice: TrainingChoice, *, recipe: Recipe = "run") -> Training:
    """The configuration's way of training, or that of published pretraining.

    Args:
        run: the configuration.
        machine: whose GPUs train.
        choice: what is not as the configuration says.
        recipe: run: as the configuration says. fastest: with the switches of the fastest published steps.

    Raises:
        ValueError: for a name that is not known.
    """
    chosen = asdict(choice)
    options = run.megatron
    if chosen["precision"] is None:
        low = "mxfp8" if options.get("fp8_recipe") == "mxfp8" else "fp8"
        chosen["precision"] = low if options.get("fp8") else {"float32": "fp32", "bfloat16": "bf16"}[run.model.dtype]
    fastest = recipe == "fastest"
    if fastest:
        graphs = "full" if chosen["precision"] == "mxfp8" else "partial"
        defaults: dict[str, Any] = {
            "dispatcher": "hybridep",
            "overlap": True,
            "recompute": "none",
            "cuda_graphs": graphs,
            "fp8_attention": graphs == "full",
        }
    else:
        flexible = options.get("moe_token_dispatcher_type") == "flex"
        defaults = {
            "dispatcher": options.get("moe_flex_dispatcher_backend", "deepep") if flexible else "alltoall",
            "overlap": bool(options.get("overlap_moe_expert_parallel_comm", False)),
            "recompute": run.actor.recompute,
            "cuda_graphs": "none",
            "fp8_attention": False,
        }
    defaults |= {"spec": "local" if machine.measured or (run.actor.layers == "local" and not fastest) else "fused"}
    chosen = {**defaults, **{key: value for key, value in chosen.items() if value is not None}}
    known: dict[str, tuple[str, ...]] = {
        "precision": PRECISIONS,
        "dispatcher": DISPATCHERS,
        "recompute": RECOMPUTES,
        "spec": SPECS,
        "cuda_graphs": CUDA_GRAPHS,
    }
    for key, values in known.items():
        if chosen[key] not in values:
            option = {"spec": "layers", "cuda_graphs": "cuda-graphs"}.get(key, key)
            raise ValueError(f"--{option}: {chosen[key]!r} is not known; {nearest(str(chosen[key]), values)}")
    return Training(
        **chosen,
        on_cpu=machine.measured,
        gradient_bytes=2 if fastest and chosen["precision"] != "fp32" else 4,
        chunk_tokens=None if fastest else run.actor.logprob_chunk_tokens,
        top_tokens=run.objective.num_top_tokens,
    )


def reinforcement_work(run: RunConfig, *, mean_tokens: int | None, colocated: bool, lengths: Lengths | None = None) -> Work:
    """One optimizer step of the run, and the sampling behind it.

    Args:
        run: the configuration.
        mean_tokens: of a response, lengths being exponential; None: as long as it may be.
        colocated: the rollout servers share the trainer's GPUs.
        lengths: of responses, in place of mean_tokens.

    Raises:
        ValueError: mean_tokens is more than a response may have.
    """
    longest = run.rollout.max_new_tokens
    mean = longest if mean_tokens is None else mean_tokens
    if mean > longest:
        raise ValueError(f"--mean-tokens: {mean} is more than rollout.max_new_tokens = {longest}")
    if lengths is None:
        lengths = exponential(mean, longest)
    prompt = run.prompts.max_prompt_tokens
    rollouts = Rollouts(
        sequences=run.rollout.prompts_per_step * run.rollout.group_size,
        group_size=run.rollout.group_size,
        prompt_tokens=prompt,
        lengths=lengths,
        servers=run.rollout.servers or len(run.rollout.endpoints),
        tp=run.rollout.tp,
    )
    return Work(
        sequences=run.sequences_per_mini_batch,
        mean_tokens=prompt + lengths.mean,
        max_tokens=prompt + longest,
        micro_batch_tokens=run.actor.max_tokens_per_micro_batch,
        updates_per_step=run.actor.updates_per_step,
        staleness=run.staleness,
        rollouts=rollouts,
        colocated=colocated,
        schedule="rolling" if run.rollout.publish == "rolling" else run.effective_schedule,
        keeps_weights=run.effective_schedule == "overlapped" and run.actor.kept_weights == "device",
    )


def plain_work(global_batch: int, sequence_length: int, micro_batch: int) -> Work:
    """One optimizer step over global_batch sequences of sequence_length tokens, micro_batch of them at a time."""
    return Work(
        sequences=global_batch,
        mean_tokens=sequence_length,
        max_tokens=sequence_length,
        micro_batch_tokens=sequence_length * micro_batch,
        updates_per_step=1,
        staleness=0,
        rollouts=None,
        colocated=False,
    )


def check_length(shape: ModelShape, work: Work) -> None:
    """Raises ValueError when prompts and responses exceed the model's positions."""
    if work.rollouts is not None and work.max_tokens > shape.max_positions:
        raise ValueError(
            f"rollout.max_new_tokens: prompts and responses of up to {work.max_tokens} tokens exceed the model's "
            f"{shape.max_positions} positions"
        )
