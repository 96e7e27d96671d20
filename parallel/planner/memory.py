"""Bytes per GPU by pipeline stage: what is kept between steps is counted exactly, the rest in the order in which it comes and goes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from parallel.layout import ParallelLayout
from parallel.planner.fused_step import run_fused_step
from parallel.planner.local_step import run_local_step
from parallel.planner.shape import ModelShape
from parallel.planner.stages import chunks_of_rank, optimizer_shard, stage_parameters
from parallel.planner.tape import Tape
from parallel.planner.training import Batch, Training

GB = 1e9

_MOMENTS_BYTES = 8  # two fp32 moments
_MASTER_BYTES = 4  # fp32 copy of a parameter that is not fp32 itself
_EXPORT_BUCKET = 256 << 20  # bytes that travel at once, parallel/weights.py
_STEP_BYTES = 4  # torch's AdamW keeps a step count for every piece


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on the busiest rank of one pipeline stage at the fullest moment of a step. What is not alive then is 0."""

    moment: str  # which that is, for people
    parameters: float
    gradients: float
    optimizer: float
    activations: float
    recomputed: float  # the one layer that a recomputing backward pass holds
    logits: float
    dispatch: float  # send and receive buffers of the experts' tokens
    context: float  # keys and values gathered or passed on between context-parallel ranks, activations between tensor-parallel ones
    temporary: float  # gradients of activations, copies in fp32, stacked weights
    rollout: float  # a server's weights and cache on the same GPU
    kept: float  # the weights that sample, while others are trained (schedule: overlapped)

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name and bytes of every part, in the order above."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}

    @property
    def largest(self) -> str:
        """Name of the largest part."""
        parts = self.parts()
        return max(parts, key=lambda name: parts[name])


def parameter_bytes(shape: ModelShape, layout: ParallelLayout, pp_rank: int, training: Training) -> int:
    """Bytes of the flat parameter buffers, Megatron's padding included."""
    return stage_parameters(shape, layout, pp_rank).buffer * training.element_bytes


def gradient_bytes(shape: ModelShape, layout: ParallelLayout, pp_rank: int, training: Training) -> int:
    """Bytes of the flat gradient buffers, Megatron's padding included."""
    return stage_parameters(shape, layout, pp_rank).buffer * training.gradient_bytes


def optimizer_bytes(shape: ModelShape, layout: ParallelLayout, rank: int, training: Training) -> int:
    """Bytes of one rank's optimizer state: moments, step counts, and the fp32 master copy where parameters are not fp32."""
    elements, pieces = optimizer_shard(shape, layout, rank)
    per_element = _MOMENTS_BYTES + (0 if training.precision == "fp32" else _MASTER_BYTES)
    return elements * per_element + pieces * _STEP_BYTES


def stage_memory(
    shape: ModelShape,
    layout: ParallelLayout,
    pp_rank: int,
    training: Training,
    batch: Batch,
    *,
    rollout_bytes: float = 0.0,
    keeps_weights: bool = False,
) -> StageMemory:
    """The parts of one stage's memory at its fullest moment.

    Args:
        shape, layout, pp_rank, training, batch: which stage of what, and what it trains.
        rollout_bytes: of a colocated server, added as it is.
        keeps_weights: a copy of the parameters lies beside them.
    """
    held = stage_parameters(shape, layout, pp_rank)
    shards = (1.0, 1.0)
    if training.fsdp:
        shards = (1 / (layout.dp * layout.cp), 1 / layout.edp)
    resident = held.dense_buffer * shards[0] + held.expert_buffer * shards[1]
    state = _MOMENTS_BYTES + (0 if training.precision == "fp32" else _MASTER_BYTES)
    stays = {
        "parameters": resident * training.element_bytes,
        "gradients": resident * training.gradient_bytes,
        "optimizer": state * (held.dense_buffer / (layout.dp * layout.cp) + held.expert_buffer / layout.edp),
        "rollout": rollout_bytes,
        "kept": resident * training.element_bytes if keeps_weights else 0.0,
    }
    tape = Tape(stays)
    in_flight = micro_batches_in_flight(layout, pp_rank, batch.num_micro_batches)
    run = run_local_step if training.spec == "local" else run_fused_step
    run(tape, shape, layout, pp_rank, training, batch, in_flight=in_flight)
    tape.at("export")
    tape.flash("temporary", _export_bytes(shape, layout, pp_rank, training))
    empty = dict.fromkeys((field.name for field in fields(StageMemory) if field.name != "moment"), 0.0)
    return StageMemory(moment=tape.fullest_moment, **(empty | tape.fullest))


def _export_bytes(shape: ModelShape, layout: ParallelLayout, pp_rank: int, training: Training) -> float:
    """Weights on their way to the servers, a bucket at a time: the largest tensor whole beside its shards, or received by the first rank.

    A bucket holds several parameters, or one that is larger. What was exported before is let go late.
    """
    chunks = chunks_of_rank(shape, layout, pp_rank)
    held = stage_parameters(shape, layout, pp_rank)
    all_bytes = (held.dense * layout.tp + held.expert * layout.etp) * training.element_bytes
    bucket = min(_EXPORT_BUCKET, all_bytes)
    largest = shape.vocab_size * shape.hidden_size * training.element_bytes if chunks[0].embeds or chunks[-1].ends else 0.0
    if layout.tp > 1:
        return largest + max(largest, bucket) + (bucket / 2 if all_bytes > bucket else 0.0)
    if layout.pp > 1:
        return max(largest, bucket)
    return bucket if layout.ep > 1 else 0.0


def micro_batches_in_flight(layout: ParallelLayout, pp_rank: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most: Megatron's 1F1B warm-up plus one; fractions with virtual stages."""
    if layout.vpp is None:
        return min(layout.pp - pp_rank, num_micro_batches)
    warm_up = 2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, num_micro_batches * layout.vpp) / layout.vpp
