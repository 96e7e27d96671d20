"""What a run's configuration says, as requests to the rehearsal (parallel/rehearsal), and its findings beside the plan's figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_minpro.cluster import planning
from megatron_minpro.cluster.training_choice import TrainingChoice
from megatron_minpro.config import RunConfig
from parallel.layout import ParallelLayout
from parallel.optimizer_settings import OptimizerSettings
from parallel.planner.hardware import Hardware
from parallel.planner.memory import GB
from parallel.planner.models import FoundConfig
from parallel.planner.plan import Plan, make_plan, remedies
from parallel.planner.shape import from_config
from parallel.rehearsal.request import RehearsalRequest
from parallel.rehearsal.result import RehearsalResult

UPDATE = "megatron_minpro.loop.rehearsed_update:update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One rank's peak beside what the device holds and what the plan says of its pipeline stage."""

    result: RehearsalResult
    limit_bytes: float
    planned_bytes: float

    @property
    def fits(self) -> bool:
        return self.result.fullest.peak <= self.limit_bytes

    @property
    def plan_error(self) -> float:
        """By how much of the rehearsed peak the plan is above it; negative is below."""
        return self.planned_bytes / self.result.fullest.peak - 1


def read_lengths(text: str) -> tuple[int, ...]:
    """Tokens of the sequences of a mini-batch, as in 22528x4,1000x8. Raises ValueError naming the option."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", part.strip())
        if match is None or int(match[1]) < 2:
            raise ValueError(f"--lengths: {text!r}, expected tokens of sequences, as in 22528x4,1000x8")
        found += [int(match[1])] * int(match[2] or 1)
    return tuple(found)


def fullest_lengths(run: RunConfig, *, micro_batches: int) -> tuple[int, ...]:
    """Sequences as long as they may become, as many as fill so many micro-batches of every replica: what memory must hold."""
    longest = run.prompts.max_prompt_tokens + run.rollout.max_new_tokens
    together = max(1, run.actor.max_tokens_per_micro_batch // longest)
    return (longest,) * (run.layout.dp * together * micro_batches)


def stage_ranks(layout: ParallelLayout) -> list[int]:
    """The first rank of every pipeline stage: the ranks of a stage differ by little else than their place."""
    return [stage * (layout.world_size // layout.pp) for stage in range(layout.pp)]


def make_requests(
    run: RunConfig, model: FoundConfig, *, ranks: Sequence[int], lengths: Sequence[int], layers: int | None
) -> list[RehearsalRequest]:
    """
    Args:
        run: the configuration.
        model: of which model.
        ranks: those to rehearse.
        lengths: tokens of the sequences of one mini-batch.
        layers: how many layers the model is shortened to; None: its own.

    Raises:
        ValueError: a rank outside the layout, a layout that the model does not allow, layers that cannot be rehearsed.
    """
    if run.actor.layers == "transformer_engine":
        raise ValueError("actor.layers: transformer_engine cannot be rehearsed, its kernels are not torch's; expected auto or local")
    values: Mapping[str, Any] = {**model.values, **({} if layers is None else {"num_hidden_layers": layers})}
    requests = []
    for rank in ranks:
        run.layout.coordinates(rank)
        request = RehearsalRequest(
            model=values,
            model_name=str(model.name),
            layout=run.layout,
            rank=rank,
            dtype=run.model.dtype,
            recompute=run.actor.recompute,
            max_tokens_per_micro_batch=run.actor.max_tokens_per_micro_batch,
            logprob_chunk_tokens=run.actor.logprob_chunk_tokens,
            temperature=run.rollout.temperature,
            optimizer=OptimizerSettings(**run.actor.optimizer.model_dump(include=set(OptimizerSettings.model_fields))),
            megatron_options=run.megatron,
            deterministic=run.debug.deterministic,
            kept_weights=run.actor.kept_weights if run.effective_schedule == "overlapped" else None,
            lengths=tuple(length - 1 for length in lengths),  # the last token is only scored
            prompt_tokens=run.prompts.max_prompt_tokens,
            top_tokens=run.objective.num_top_tokens,
            update=UPDATE,
            update_options={"name": run.objective.name, "options": dict(run.objective.options)},
        )
        run.layout.check_model(request.architecture)
        requests.append(request)
    return requests


def plan_of(run: RunConfig, model: FoundConfig, machine: Hardware, *, layers: int | None) -> Plan:
    """The planner's figures for the same run, layers and model. Raises ValueError as the planner does."""
    shape = from_config(model.values, name=str(model.name), source=model.source)
    if layers is not None:
        shape = replace(shape, num_layers=layers)
    training = planning.training_of(run, machine, TrainingChoice(spec="local"))
    return make_plan(shape, run.layout, training, machine, planning.reinforcement_work(run, mean_tokens=None, colocated=False))


def failure(verdicts: Sequence[Verdict], plan: Plan) -> str | None:
    """In one line why the run would fail: a fault, or memory, with the largest holders and what would help. None when it would not."""
    for verdict in verdicts:
        fault = verdict.result.fault
        if fault is not None:
            who = "CUDA or NCCL would raise" if fault.of_device else fault.kind
            return f"rank {verdict.result.request.rank}, {fault.phase}: {who}: {fault.message}"
    fullest = max(verdicts, key=lambda verdict: verdict.result.fullest.peak - verdict.limit_bytes)
    if fullest.fits:
        return None
    phase = fullest.result.fullest
    holders = "; ".join(f"{each.num_bytes / GB:.1f} GB {each.kind} of {each.site}" for each in phase.holders[:3])
    changes = "; ".join(change for change, _ in remedies(plan))
    return (
        f"rank {fullest.result.request.rank} does not fit: {phase.name} needs {phase.peak / GB:.1f} GB of "
        f"{fullest.limit_bytes / GB:.1f} GB; largest holders: {holders}{f'; by the plan this would help: {changes}' if changes else ''}"
    )
