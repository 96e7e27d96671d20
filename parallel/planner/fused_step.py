"""The moments of a step with TransformerEngine's layers: what is alive in a layer's backward pass, and in the head's.

These layers do not run where the project is developed: what they keep is counted from their source, and held against published peaks.
Shapes in remarks: t tokens of one micro-batch on this rank, H hidden, q and k query and key-value widths of this rank, F feed-forward
width, K experts per token, e bytes of an element.
"""

from __future__ import annotations

from parallel.layout import ParallelLayout
from parallel.planner.shape import ModelShape
from parallel.planner.stages import chunks_of_rank
from parallel.planner.tape import Tape
from parallel.planner.training import Batch, Training


def run_fused_step(
    tape: Tape, shape: ModelShape, layout: ParallelLayout, pp_rank: int, training: Training, batch: Batch, *, in_flight: float
) -> None:
    """Both moments on a tape that holds what stays.

    Args:
        tape: gets everything else.
        shape, layout, pp_rank, training, batch: which stage of what, and what it trains.
        in_flight: micro-batches whose activations the stage holds at once.
    """
    t = batch.micro_batch_tokens / layout.cp
    chunks = chunks_of_rank(shape, layout, pp_rank)
    layers = sum(chunk.num_layers for chunk in chunks)
    dense_layers = sum(max(0, min(chunk.last, shape.num_dense_layers) - chunk.first) for chunk in chunks)
    whole = {is_moe: layer_bytes(shape, layout, training, t, is_moe=is_moe) for is_moe in (False, True)}
    saved = (
        {is_moe: t / layout.tp * shape.hidden_size * training.element_bytes for is_moe in whole} if training.recompute == "full" else whole
    )
    mtp = shape.mtp_layers if chunks[-1].ends else 0
    tape.hold("activations", in_flight * (saved[False] * dense_layers + saved[True] * (layers - dense_layers)) + mtp * saved[True])
    if chunks[-1].ends:
        tape.at("head")
        tape.hold("activations", _end_bytes(shape, layout, training, t))
        logits = (1 + mtp) * _logits_bytes(shape, layout, training, t)
        tape.hold("logits", logits)
        if training.chunk_tokens is not None:
            tape.drop("logits", logits)
    tape.at("backward")
    kinds = [False] * (dense_layers > 0) + [True] * (layers > dense_layers)
    tape.hold("recomputed", max(whole[kind] - saved[kind] for kind in kinds))
    tape.hold("dispatch", _dispatch_bytes(shape, layout, training, t) if shape.is_moe else 0.0)
    tape.hold("context", _context_bytes(shape, layout, training, t))
    tape.release("activations", "recomputed", "dispatch", "context")


def layer_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, *, is_moe: bool) -> float:
    """Everything that one layer's backward pass reads of its forward pass, without recomputation.

    Qwen3-30B-A3B in bf16: 28 H elements a token. Flash attention keeps its inputs, its output and one number per head, so selective
    recomputation wins nothing.
    """
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


def _routed(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """Rows that the busiest rank's experts receive of one micro-batch on every rank."""
    own = t / layout.tp if layout.sequence_parallel else t
    return own * shape.top_k * layout.etp * training.imbalance


def _end_bytes(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """The final norm, the head's input, and the loss's few numbers per token."""
    own = t / layout.tp if layout.sequence_parallel else t
    e, h = training.element_bytes, shape.hidden_size
    gathered = t * h * e if layout.tp > 1 else 0.0
    return own * 2 * h * e + gathered


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
    """Keys and values on their way: the next and the present neighbour's (ring)."""
    if layout.cp == 1:
        return 0.0
    return 2 * t * 2 * shape.key_width / layout.tp * training.element_bytes
