"""Seconds of one optimizer step: layers into stages, stages into a pipeline, then what comes once a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.layout import ParallelLayout
from parallel.planner import communication, compute
from parallel.planner.efficiency import DEFAULT, Efficiency
from parallel.planner.hardware import Hardware
from parallel.planner.shape import ModelShape
from parallel.planner.stages import chunks_of_rank, stage_parameters
from parallel.planner.training import Batch, Training

_OPTIMIZER_BYTES = 28  # of one element: fp32 master and moments read and written, gradient read, parameter written


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step and where they go on the busiest stage. `parts` add up to step_s."""

    step_s: float
    parts: Mapping[str, float]
    tokens: float  # of the whole step, over all replicas
    flops: float  # of the whole step, Megatron's convention
    world_size: int
    peak_flops: float  # of one GPU in the precision of the products

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.step_s / self.world_size

    @property
    def tflops_per_gpu(self) -> float:
        return 1e-12 * self.flops / self.step_s / self.world_size

    @property
    def mfu(self) -> float:
        """Model FLOPs over the nominal dense peak of the precision used."""
        return self.flops / self.step_s / self.world_size / self.peak_flops


def step_time(
    shape: ModelShape, layout: ParallelLayout, hardware: Hardware, training: Training, batch: Batch, *, efficiency: Efficiency = DEFAULT
) -> StepTime:
    """Predict one optimizer step. Raises ValueError for a precision that the hardware does not have."""
    machine = compute.Machine(hardware=hardware, efficiency=efficiency, precision=training.precision)
    stages = [_stage(shape, layout, machine, training, batch, rank) for rank in range(layout.pp)]
    slowest = max(range(layout.pp), key=lambda rank: sum(stages[rank].values()))
    one = stages[slowest]
    m = batch.num_micro_batches
    parts = {name: m * seconds for name, seconds in one.items()}
    parts["pipeline bubble"] = sum(one.values()) * (layout.pp - 1) / (layout.vpp or 1)
    held = stage_parameters(shape, layout, slowest)
    if training.fsdp:
        traffic = m * communication.sharded_parameters_seconds(held, layout, machine, training)
        reduction = max(0.0, traffic - sum(parts.values()))
    else:
        reduction = communication.data_parallel_seconds(held, layout, machine, training)
        if training.spec == "fused":  # reduced bucket by bucket behind the last micro-batch's backward pass
            reduction = max(0.1 * reduction, reduction - sum(one.values()))
    parts["gradients and parameters"] = reduction
    shard = held.dense_buffer / (layout.dp * layout.cp) + held.expert_buffer / layout.edp
    parts["optimizer"] = shard * _OPTIMIZER_BYTES / machine.bytes_per_second
    tokens = batch.micro_batch_tokens * m * layout.dp
    return StepTime(
        step_s=sum(parts.values()),
        parts=parts,
        tokens=tokens,
        flops=tokens * shape.flops_per_token(batch.sequence_length),
        world_size=layout.world_size,
        peak_flops=hardware.peak_flops(training.precision),
    )


def forward_seconds(
    shape: ModelShape, layout: ParallelLayout, hardware: Hardware, training: Training, batch: Batch, *, efficiency: Efficiency = DEFAULT
) -> float:
    """Seconds of a forward-only pass over the same tokens (log-probabilities): a third of the step's layers, nothing after them."""
    step = step_time(shape, layout, hardware, training, batch, efficiency=efficiency)
    passes = 4 if training.recompute == "full" else 3
    return (step.step_s - step.parts["gradients and parameters"] - step.parts["optimizer"]) / passes


def _stage(
    shape: ModelShape, layout: ParallelLayout, machine: compute.Machine, training: Training, batch: Batch, pp_rank: int
) -> dict[str, float]:
    """Seconds of one micro-batch on one stage, by kind."""
    chunks = chunks_of_rank(shape, layout, pp_rank)
    dense_layers = sum(max(0, min(chunk.last, shape.num_dense_layers) - chunk.first) for chunk in chunks)
    layers = sum(chunk.num_layers for chunk in chunks)
    ends = chunks[-1].ends
    total: dict[str, float] = {}
    for is_moe, count in ((False, dense_layers), (True, layers - dense_layers + (shape.mtp_layers if ends else 0))):
        if count:
            for name, seconds in _layer(shape, layout, machine, training, batch, is_moe=is_moe).items():
                total[name] = total.get(name, 0.0) + count * seconds
    if ends:
        head = compute.head_seconds(shape, layout, machine, batch, training)
        total["vocabulary head"] = (1 + shape.mtp_layers) * head.total
    total["pipeline transfers"] = communication.pipeline_seconds(shape, layout, machine, batch, training)
    return total


def _layer(
    shape: ModelShape, layout: ParallelLayout, machine: compute.Machine, training: Training, batch: Batch, *, is_moe: bool
) -> dict[str, float]:
    """Seconds of one layer and micro-batch that show in the step, by kind."""
    again = 1.0 if training.recompute == "full" else 0.0

    def passes(seconds: compute.Seconds) -> float:
        return (1 + again) * seconds.forward + seconds.backward

    attention = compute.attention_seconds(shape, layout, machine, batch, training)
    once_more = attention.forward if training.recompute == "selective" else 0.0
    parts = {
        "projections": passes(compute.projections_seconds(shape, layout, machine, batch)),
        "attention": passes(attention) + once_more,
        "experts" if is_moe else "feed-forward": passes(
            compute.feed_forward_seconds(shape, layout, machine, batch, training, is_moe=is_moe)
        ),
        "element-wise": passes(compute.elementwise_seconds(shape, layout, machine, batch, training, is_moe=is_moe)),
    }
    tp_forward, tp_backward = communication.tensor_parallel_seconds(shape, layout, machine, batch, training, is_moe=is_moe)
    parts["tensor parallelism"] = (1 + again) * tp_forward + tp_backward
    cp_forward, cp_backward = communication.context_parallel_seconds(shape, layout, machine, batch, training)
    context = (1 + again) * cp_forward + cp_backward
    # A ring hides behind the blocks of attention it feeds, but for its first step.
    parts["context parallelism"] = context if training.spec == "local" else max(context / layout.cp, context - parts["attention"])
    if is_moe:
        dispatch = (4 + 2 * again) * communication.dispatch_seconds(shape, layout, machine, batch, training)
        parts["dispatch"] = dispatch * (1 - communication.hidden_part(machine, training))
    parts["kernel gaps"] = (1 + again / 3) * 1e-6 * machine.efficiency.kernel_gaps_us * (1.0 if is_moe else compute.DENSE_SHARE)
    host = (1 + again / 3) * compute.host_seconds(shape, layout, machine, training, is_moe=is_moe)
    parts["host"] = max(0.0, host - sum(parts.values()))
    if is_moe and training.dispatcher == "alltoall" and layout.ep > 1:
        parts["host"] = max(parts["host"], machine.efficiency.alltoall_sync * host)
    return parts
