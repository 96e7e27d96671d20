"""One plan: a layout's memory, its time, whether it fits, and if not, which single change would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from parallel.layout import ParallelLayout
from parallel.planner.efficiency import efficiency_of
from parallel.planner.hardware import Hardware
from parallel.planner.memory import GB, StageMemory, stage_memory
from parallel.planner.rl import GlobalStep, Schedule, schedules, server_bytes, sync_seconds
from parallel.planner.rollout_server import rollout_server
from parallel.planner.sampling import Rollouts, simulate_sampling
from parallel.planner.shape import ModelShape
from parallel.planner.stages import check_layout, stage_parameters
from parallel.planner.step import StepTime, forward_seconds, step_time
from parallel.planner.training import Batch, Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one optimizer step trains. rollouts: where its sequences come from, None outside reinforcement learning.

    sequences: of the step, over all replicas. mean_tokens, max_tokens: of a whole sequence. A micro-batch holds up to micro_batch_tokens.
    keeps_weights: the trainer's GPUs hold the weights that sample beside those that are trained.
    """

    sequences: int
    mean_tokens: float
    max_tokens: int
    micro_batch_tokens: int
    updates_per_step: int
    staleness: int
    rollouts: Rollouts | None
    colocated: bool
    schedule: Schedule = "serial"
    keeps_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A prediction. memory: one entry per pipeline stage."""

    shape: ModelShape
    layout: ParallelLayout
    training: Training
    hardware: Hardware
    work: Work
    memory: tuple[StageMemory, ...]
    time: StepTime
    global_step: GlobalStep | None

    @property
    def fullest(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.hardware.usable_bytes

    @property
    def missing_bytes(self) -> float:
        """By how much the fullest stage exceeds a GPU; negative is room."""
        return self.fullest.total - self.hardware.usable_bytes


def batch_of(work: Work, layout: ParallelLayout) -> Batch:
    """Sequences shared by the replicas and packed into micro-batches, as parallel.packing does, with every one of mean length."""
    multiple = layout.sequence_multiple
    length = -(-work.mean_tokens // multiple) * multiple
    mine = -(-work.sequences // layout.dp)
    together = max(1, min(mine, int(work.micro_batch_tokens // length)))
    count = -(-mine // together)
    if layout.vpp is not None:
        count = -(-count // layout.pp) * layout.pp
    # The last micro-batch is seldom full: time follows the tokens there are.
    return Batch(micro_batch_tokens=round(mine * length / count), num_micro_batches=count, sequence_length=work.mean_tokens)


def fullest_batch(work: Work, layout: ParallelLayout) -> Batch:
    """The largest micro-batch that packing may make: what memory must hold."""
    batch = batch_of(work, layout)
    longest = min(work.micro_batch_tokens, -(-work.sequences // layout.dp) * work.max_tokens)
    return replace(batch, micro_batch_tokens=max(batch.micro_batch_tokens, longest), sequence_length=work.max_tokens)


def make_plan(shape: ModelShape, layout: ParallelLayout, training: Training, hardware: Hardware, work: Work) -> Plan:
    """Raises ValueError for a layout that the model does not allow and for a precision that the hardware does not have."""
    check_layout(shape, layout)
    efficiency = efficiency_of(hardware)
    batch, fullest = batch_of(work, layout), fullest_batch(work, layout)
    server = 0.0
    if work.rollouts is not None and work.colocated:
        server = server_bytes(shape, hardware, work.rollouts)
    time = step_time(shape, layout, hardware, training, batch, efficiency=efficiency)
    global_step = None
    if work.rollouts is not None:
        forward = forward_seconds(shape, layout, hardware, training, batch, efficiency=efficiency)
        server_of_run = rollout_server(shape, hardware, tp=work.rollouts.tp, efficiency=efficiency)
        global_step = GlobalStep(
            sampling=simulate_sampling(server_of_run, work.rollouts),
            logprobs_s=work.updates_per_step * forward,
            updates_s=work.updates_per_step * time.step_s,
            sync_s=sync_seconds(shape),
            staleness=work.staleness,
            schedule=work.schedule,
        )
    return Plan(
        shape=shape,
        layout=layout,
        training=training,
        hardware=hardware,
        work=work,
        memory=tuple(
            stage_memory(shape, layout, stage, training, fullest, rollout_bytes=server, keeps_weights=work.keeps_weights)
            for stage in range(layout.pp)
        ),
        time=time,
        global_step=global_step,
    )


def remedies(plan: Plan) -> list[tuple[str, Plan]]:
    """Single changes that would make the plan fit, fastest first; without one that suffices, the three that save most."""
    found = []
    for change, layout, training, work in _changes(plan):
        try:
            other = make_plan(plan.shape, layout, training, plan.hardware, work)
        except ValueError:  # this change is not legal: it is no remedy
            continue
        if other.missing_bytes < plan.missing_bytes:
            found.append((change, other))
    enough = [pair for pair in found if pair[1].fits]
    if enough:
        return sorted(enough, key=lambda pair: -pair[1].time.tokens_per_s_per_gpu)[:3]
    return sorted(found, key=lambda pair: pair[1].missing_bytes)[:3]


def _changes(plan: Plan) -> Iterator[tuple[str, ParallelLayout, Training, Work]]:
    layout, training, work = plan.layout, plan.training, plan.work
    if training.recompute != "full":
        yield "actor.recompute=full", layout, replace(training, recompute="full"), work
    longest = max(work.max_tokens, work.micro_batch_tokens // 2)
    if longest < work.micro_batch_tokens:
        yield f"actor.max_tokens_per_micro_batch={longest}", layout, training, replace(work, micro_batch_tokens=longest)
    for axis in ("ep", "tp", "pp", "cp"):
        size = 2 * getattr(layout, axis)
        for world_size in (layout.world_size, 2 * layout.world_size):
            try:
                changed = replace(
                    layout, **{axis: size, "world_size": world_size}, sequence_parallel=layout.sequence_parallel or axis == "tp"
                )
            except ValueError:  # does not divide the ranks
                continue
            more = "" if world_size == layout.world_size else f" world_size={world_size}"
            yield f"parallel.{axis}={size}{more}", changed, training, work
            break


def notes(plan: Plan) -> list[str]:
    """What the numbers rest on that the command line does not show."""
    found = []
    if plan.work.rollouts is not None:
        lengths, prompt = plan.work.rollouts.lengths, plan.work.rollouts.prompt_tokens
        if plan.work.mean_tokens == plan.work.max_tokens:
            found.append("assumes that every response has rollout.max_new_tokens tokens; set --mean-tokens or --lengths to change that")
        else:
            found.append(
                f"lengths of responses: {lengths.source}; under way they are {lengths.under_way + prompt:,.0f} tokens, prompt included"
            )
    if plan.training.spec == "fused" and plan.work.rollouts is not None:
        found.append("layers: TransformerEngine's, which actor.layers: auto takes where it imports; --layers local plans the project's own")
    if plan.shape.is_moe and plan.training.imbalance == 1.0 and plan.work.rollouts is not None:
        found.append("experts are assumed to be equally busy; published dropless training fits --imbalance 1.55")
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """For programs. GB are 1e9 bytes; seconds are of one optimizer step, and of one global step under rl."""
    layout, work, step = plan.layout, plan.work, plan.global_step
    axes = (*(field.name for field in fields(ParallelLayout)), "dp", "edp")
    result: dict[str, Any] = {
        "model": plan.shape.name,
        "parameters": plan.shape.total_parameters,
        "hardware": plan.hardware.name,
        "layout": {axis: getattr(layout, axis) for axis in axes},
        "precision": plan.training.precision,
        "dispatcher": plan.training.dispatcher,
        "overlap": plan.training.overlap,
        "cuda_graphs": plan.training.cuda_graphs,
        "layers": plan.training.spec,
        "recompute": plan.training.recompute,
        "micro_batches": batch_of(work, layout).num_micro_batches,
        "step_s": plan.time.step_s,
        "tokens_per_s_per_gpu": plan.time.tokens_per_s_per_gpu,
        "tflops_per_gpu": plan.time.tflops_per_gpu,
        "mfu": plan.time.mfu,
        "time_s": dict(plan.time.parts),
        "fits": plan.fits,
        "memory_limit_gb": plan.hardware.usable_bytes / GB,
        "missing_gb": max(0.0, plan.missing_bytes) / GB,
        "memory_gb": [
            {
                "stage": stage,
                "layers": [chunk.num_layers for chunk in layout.chunks_of_rank(plan.shape.num_layers, stage)],
                "parameters_per_gpu": stage_parameters(plan.shape, layout, stage).numel,
                "total": memory.total / GB,
                "largest": memory.largest,
                "moment": memory.moment,
                **{name: value / GB for name, value in memory.parts().items()},
            }
            for stage, memory in enumerate(plan.memory)
        ],
        "notes": notes(plan),
    }
    if step is not None:
        result["rl"] = {
            "sampling_s": step.sampling.batch_s,
            "sampling_server_s": step.sampling.server_s,
            "logprobs_s": step.logprobs_s,
            "updates_s": step.updates_s,
            "weight_sync_s": step.sync_s,
            "staleness": step.staleness,
            "schedule": step.schedule,
            "global_step_s": step.step_s,
            **{
                schedule: {
                    "step_s": step.seconds(schedule),
                    "trainer_idle": step.trainer_idle(schedule),
                    "servers_idle": step.servers_idle(schedule),
                }
                for schedule in schedules(step)
            },
        }
    return result
