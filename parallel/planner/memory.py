"""Bytes per GPU by pipeline stage: what is kept between steps is counted exactly, activations tensor by tensor.

Shapes in remarks: t tokens of one micro-batch on this rank, H hidden, q and k query and key-value widths of this rank, F feed-forward
width, K experts per token, e bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from parallel.layout import ParallelLayout
from parallel.planner.shape import ModelShape
from parallel.planner.stages import chunks_of_rank, optimizer_shard, stage_parameters
from parallel.planner.training import Batch, Training

GB = 1e9

_MOMENTS_BYTES = 8  # two fp32 moments
_MASTER_BYTES = 4  # fp32 copy of a parameter that is not fp32 itself
_STEP_BYTES = 4  # torch's AdamW keeps a step count for every piece


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on the busiest rank of one pipeline stage at the fullest moment of a step."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    recomputed: float  # the one layer that a recomputing backward pass holds
    logits: float
    dispatch: float  # send and receive buffers of the experts' tokens
    context: float  # keys and values gathered or passed on between context-parallel ranks
    rollout: float  # a server's weights and cache on the same GPU
    kept: float  # the weights that sample, while others are trained (schedule: overlapped)

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name and bytes of every part, in the order above."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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
    """The parts of one stage's memory.

    Args:
        shape, layout, pp_rank, training, batch: which stage of what, and what it trains.
        rollout_bytes: of a colocated server, added as it is.
        keeps_weights: a copy of the parameters lies beside them.
    """
    t, length = batch.micro_batch_tokens / layout.cp, batch.sequence_length
    chunks = chunks_of_rank(shape, layout, pp_rank)
    layers = sum(chunk.num_layers for chunk in chunks)
    held = stage_parameters(shape, layout, pp_rank)
    shards = (1.0, 1.0)
    if training.fsdp:
        shards = (1 / (layout.dp * layout.cp), 1 / layout.edp)
    resident = held.dense_buffer * shards[0] + held.expert_buffer * shards[1]
    state = _MOMENTS_BYTES + (0 if training.precision == "fp32" else _MASTER_BYTES)
    optimizer = state * (held.dense_buffer / (layout.dp * layout.cp) + held.expert_buffer / layout.edp)

    in_flight = micro_batches_in_flight(layout, pp_rank, batch.num_micro_batches)
    dense_layers = sum(max(0, min(chunk.last, shape.num_dense_layers) - chunk.first) for chunk in chunks)
    per_layer = {is_moe: layer_activation_bytes(shape, layout, training, t, is_moe=is_moe) for is_moe in (False, True)}
    saved = {is_moe: saved_bytes(shape, layout, training, t, is_moe=is_moe) for is_moe in (False, True)}
    mtp = shape.mtp_layers if chunks[-1].ends else 0
    of_layers = saved[False] * dense_layers + saved[True] * (layers - dense_layers)
    activations = in_flight * (of_layers + mask_bytes(layout, training, t, length)) + mtp * saved[True]
    kinds = [False] * (dense_layers > 0) + [True] * (layers > dense_layers)
    recomputed = max(per_layer[kind] - saved[kind] for kind in kinds)
    logits = 0.0
    if chunks[-1].ends:
        activations += _end_bytes(shape, layout, training, t)
        logits = (1 + mtp) * _logits_bytes(shape, layout, training, t)
    return StageMemory(
        parameters=resident * training.element_bytes,
        gradients=resident * training.gradient_bytes,
        optimizer=optimizer,
        activations=activations,
        recomputed=recomputed,
        logits=logits,
        dispatch=_dispatch_bytes(shape, layout, training, t) if shape.is_moe else 0.0,
        context=_context_bytes(shape, layout, training, t),
        rollout=rollout_bytes,
        kept=resident * training.element_bytes if keeps_weights else 0.0,
    )


def micro_batches_in_flight(layout: ParallelLayout, pp_rank: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at most: Megatron's 1F1B warm-up plus one; fractions with virtual stages."""
    if layout.vpp is None:
        return min(layout.pp - pp_rank, num_micro_batches)
    warm_up = 2 * (layout.pp - pp_rank - 1) + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, num_micro_batches * layout.vpp) / layout.vpp


def saved_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, *, is_moe: bool) -> float:
    """What one layer keeps of one micro-batch from forward to backward."""
    if training.recompute == "full":
        return t / layout.tp * shape.hidden_size * training.element_bytes  # its input
    whole = layer_activation_bytes(shape, layout, training, t, is_moe=is_moe)
    return whole - core_attention_bytes(shape, layout, training, t) if training.recompute == "selective" else whole


def layer_activation_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, *, is_moe: bool) -> float:
    """Everything that one layer's backward pass reads of its forward pass, without recomputation."""
    if training.spec == "local":
        return _local_layer(shape, layout, training, t, is_moe) + core_attention_bytes(shape, layout, training, t)
    return _fused_layer(shape, layout, training, t, is_moe)


def core_attention_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """What selective recomputation does not keep."""
    if training.spec == "fused":
        return 0.0  # flash attention keeps its inputs, its output and one number per head: there is nothing to win
    q, k, e = shape.query_width / layout.tp, shape.key_width / layout.tp, training.element_bytes
    return t * ((2 * q + layout.cp * 2 * k) * e + shape.num_heads / layout.tp * 4)


def mask_bytes(layout: ParallelLayout, training: Training, t: float, length: float) -> float:
    """Which keys each query of a micro-batch may see, added to the scores: one mask for all layers. Flash attention has none."""
    return t * length * training.element_bytes if training.spec == "local" and layout.cp > 1 else 0.0


def _fused_layer(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, is_moe: bool) -> float:
    """TransformerEngine's layers. Qwen3-30B-A3B in bf16: 28 H elements a token."""
    e, h = training.element_bytes, shape.hidden_size
    low = 1 if training.precision in ("fp8", "mxfp8") else e  # inputs of products are kept in the precision of the products
    own = t / layout.tp if layout.sequence_parallel else t
    q, k = shape.query_width / layout.tp, shape.key_width / layout.tp
    v = shape.num_heads * shape.v_dim / layout.tp
    attention = own * (2 * h * e + 2 * h * low)  # two norms: input, output
    attention += t * ((q + k) * e + (q + 2 * k) * e + v * e)  # before the head norms; q, k, v; the core's output
    if low != e:
        attention += t * v * low  # the output again, as the projection's input
    if not is_moe:
        f = shape.dense_ffn / layout.tp
        return attention + t * (2 * f * e + f * low)
    routed, f = _routed(shape, layout, training, t), shape.expert_ffn / layout.etp
    experts = routed * (h * low + 2 * f * e + f * low)
    return attention + experts + t * 3 * shape.shared_ffn / layout.tp * e + own * shape.num_experts * 8


def _local_layer(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, is_moe: bool) -> float:
    """This project's layers without the core of attention: parallel/norm.py, attention.py, experts.py; Megatron's own for the rest."""
    e, h, experts, top_k = training.element_bytes, shape.hidden_size, shape.num_experts, shape.top_k
    own = t / layout.tp if layout.sequence_parallel else t
    q, k, heads = shape.query_width / layout.tp, shape.key_width / layout.tp, (shape.num_heads + shape.num_kv_heads) / layout.tp
    total = own * 2 * (2 * h * e + 4)  # two norms: input, output, one fp32 number
    total += t * (q * e + (q + 2 * k) * e + 4 * heads)  # head norms: queries apart, keys inside the projection's output
    total += t * (q + k) * e  # rotated, before they are laid side by side
    if layout.cp > 1:
        total += t * layout.cp * 2 * k * e  # gathered keys and values
    total += t * q * e  # the projection's input
    if not is_moe:
        return total + t * 5 * shape.dense_ffn / layout.tp * e
    total += own * (20 * top_k + experts * (1 + e))  # expert numbers, weights, routing maps
    f = shape.expert_ffn / layout.etp
    return total + _routed(shape, layout, training, t) * (h + 3 * f + 1) * e


def _routed(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """Rows that the busiest rank's experts receive of one micro-batch on every rank."""
    own = t / layout.tp if layout.sequence_parallel else t
    return own * shape.top_k * layout.etp * training.imbalance


def _end_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """The final norm, the head's input, and the loss's few numbers per token."""
    own = t / layout.tp if layout.sequence_parallel else t
    e, h = training.element_bytes, shape.hidden_size
    gathered = t * h * e if layout.tp > 1 else 0.0
    if training.spec == "fused":
        return own * 2 * h * e + gathered
    return own * (2 * h * e + 4) + gathered + t * 40


def _logits_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    vocabulary = shape.vocab_size / layout.tp
    if training.chunk_tokens is None:
        return t * vocabulary * (4 if training.precision == "fp32" else 2 + 4)  # the product, and its fp32 copy
    # Two fp32 buffers of a chunk, and the fp32 gradient of the head with its copy in the parameters' precision.
    copy = 0 if training.precision == "fp32" else training.element_bytes
    return 2 * min(training.chunk_tokens, t) * vocabulary * 4 + vocabulary * shape.hidden_size * (4 + copy)


def _dispatch_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """Tokens on their way: what is sent beside what arrives, in forward; twice with two micro-batches under way."""
    if layout.ep == 1:
        return 0.0
    own = t / layout.tp if layout.sequence_parallel else t
    copies = shape.top_k if training.dispatcher == "alltoall" else min(shape.top_k, layout.ep)
    once = own * copies * shape.hidden_size * training.element_bytes * training.imbalance
    return once * (2 if training.dispatcher != "alltoall" else 1) * (2 if training.overlap else 1)


def _context_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """Keys and values on their way: the next and the present neighbour's (ring); gathered ones are activations of the local spec."""
    if layout.cp == 1 or training.spec == "local":
        return 0.0
    return 2 * t * 2 * shape.key_width / layout.tp * training.element_bytes
