"""The moments of a step with the local layers, one after the other on a tape: scoring, forward, head, backward, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.layout import ParallelLayout
from parallel.planner.local_layers import ACTIVATIONS, CONTEXT, DISPATCH, EXPONENTIALS, LOGITS, RECOMPUTED, TEMPORARY, LocalLayer
from parallel.planner.shape import ModelShape
from parallel.planner.stages import chunks_of_rank, largest_gradient
from parallel.planner.tape import Tape
from parallel.planner.training import Batch, Training
from parallel.stages import Chunk

_MICRO_BATCH_BYTES = 48  # of a token: ids, labels, positions, masks, streams
# Of one of a token's top tokens: what is kept for the head's backward pass, and what else the loss makes of it (score_centering.py).
_TOP_TOKEN_KEPT, _TOP_TOKEN_LOSS = 12, 26


def local_layer(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, *, is_moe: bool) -> LocalLayer:
    """The sizes of one layer for `t` tokens on this rank."""
    e, hidden = training.element_bytes, shape.hidden_size
    own = t / layout.tp if layout.sequence_parallel else t
    query, key = shape.query_width / layout.tp, shape.key_width / layout.tp
    sent = own * shape.top_k
    arrived = sent * training.imbalance
    routed = arrived * layout.etp
    experts = shape.num_experts // layout.ep if is_moe else 0
    expert_ffn, dense_ffn = shape.expert_ffn / layout.etp, shape.dense_ffn / layout.tp
    return LocalLayer(
        element=e,
        own=own * hidden * e,
        all=t * hidden * e,
        query=t * query * e,
        key=t * key * e,
        heads=t * shape.num_heads / layout.tp * 4,
        sequence_parallel=layout.sequence_parallel,
        cp=layout.cp,
        varlen=not training.on_cpu and training.precision != "fp32",
        grouped=not training.on_cpu,
        keeps_core=training.recompute != "selective",
        is_moe=is_moe,
        routing=own * (20 * shape.top_k + shape.num_experts),
        sent=sent * hidden * e,
        arrived=arrived * hidden * e,
        routed=routed * hidden * e,
        hidden=(routed * 2 * expert_ffn if is_moe else t * 2 * dense_ffn) * e,
        first_weight=experts * 2 * expert_ffn * hidden * e,
        second_weight=experts * expert_ffn * hidden * e,
        travels=layout.ep * layout.etp * layout.pp > 1,
        exchanged=layout.ep > 1,
        gathered=layout.etp > 1,
    )


def held_after_forward(shape: ModelShape, layout: ParallelLayout, pp_rank: int, training: Training, batch: Batch) -> float:
    """Bytes that one micro-batch leaves for the backward pass, in all chunks of a stage."""
    t = batch.micro_batch_tokens / layout.cp
    chunks = chunks_of_rank(shape, layout, pp_rank)
    held = sum(_kept(local_layer(shape, layout, training, t, is_moe=is_moe), training) * count for is_moe, count in _layers(shape, chunks))
    held += _shared(shape, layout, training, t, batch.sequence_length)
    if chunks[-1].ends:
        held += _head_input(shape, layout, training, t)
    return held


def run_local_step(
    tape: Tape, shape: ModelShape, layout: ParallelLayout, pp_rank: int, training: Training, batch: Batch, *, in_flight: float
) -> None:
    """All moments of a step on a tape that holds what stays.

    Args:
        tape: gets everything else.
        shape, layout, pp_rank, training, batch: which stage of what, and what it trains.
        in_flight: micro-batches whose activations the stage holds at once.
    """
    t = batch.micro_batch_tokens / layout.cp
    chunks = chunks_of_rank(shape, layout, pp_rank)
    kinds = [(local_layer(shape, layout, training, t, is_moe=is_moe), count) for is_moe, count in _layers(shape, chunks)]
    head = _Head(shape, layout, training, t) if chunks[-1].ends else None
    if layout.sequence_parallel:
        tape.hold(CONTEXT, kinds[0][0].all)  # Megatron's buffer of gathered activations, kept from the first use on
    tape.hold(ACTIVATIONS, batch.num_micro_batches * t * _MICRO_BATCH_BYTES)
    _score(tape, [layer for layer, _ in kinds], head, shared=_shared(shape, layout, training, t, batch.sequence_length))
    tape.at("update")
    tape.hold(ACTIVATIONS, in_flight * _shared(shape, layout, training, t, batch.sequence_length))
    embedding = shape.vocab_size / layout.tp * shape.hidden_size * training.element_bytes
    # The head's gradient of a tied embedding waits for the embedding's own.
    waiting = embedding if shape.tied and head is not None and chunks[0].embeds else 0.0
    _update(tape, kinds, head, training, waiting=waiting, in_flight=in_flight, pipeline=_Pipeline.of(layout, chunks))
    if chunks[0].embeds:
        tape.at("backward of the embedding")
        tape.flash(TEMPORARY, embedding)
    tape.release(ACTIVATIONS, RECOMPUTED, LOGITS, DISPATCH, TEMPORARY)
    tape.at("gradient norm")
    tape.flash(TEMPORARY, 4 * largest_gradient(shape, layout, pp_rank))


def _layers(shape: ModelShape, chunks: tuple[Chunk, ...]) -> list[tuple[bool, int]]:
    """(whether it has experts, how many of them)."""
    dense = sum(max(0, min(chunk.last, shape.num_dense_layers) - chunk.first) for chunk in chunks)
    total = sum(chunk.num_layers for chunk in chunks)
    return [(is_moe, count) for is_moe, count in ((False, dense), (True, total - dense)) if count]


def _shared(shape: ModelShape, layout: ParallelLayout, training: Training, t: float, length: float) -> float:
    """Of one micro-batch, for all layers: the rotation, which keys the pieces of attention read, or masks."""
    e = training.element_bytes
    shared = t * shape.qk_dim * e
    if layout.cp == 1:
        return shared
    if training.on_cpu or training.precision == "fp32":
        return shared + t * length * e
    return shared + t * (2 * layout.cp + 1) / 2 * 8


def _kept(layer: LocalLayer, training: Training) -> float:
    """Of one layer: its input, and what the graph keeps beside it."""
    if training.recompute == "full":
        return layer.own
    tape = Tape({})
    layer.forward(tape, graph=True)
    return tape.held(ACTIVATIONS)


def _head_input(shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> float:
    """What the head's backward pass reads: the last layer's output, the normed one, and numbers of every token."""
    own = t / layout.tp if layout.sequence_parallel else t
    e, h = training.element_bytes, shape.hidden_size
    gathered = t * h * e if layout.sequence_parallel or training.precision != "fp32" else 0.0
    return own * (h * e + (h * e if training.precision == "fp32" else 0.0) + 4) + gathered + t * 40


def _score(tape: Tape, layers: list[LocalLayer], head: _Head | None, *, shared: float) -> None:
    """Forward passes without a graph, one micro-batch at a time."""
    tape.at("scoring")
    tape.hold(ACTIVATIONS, shared)
    for layer in layers:
        tape.hold(ACTIVATIONS, layer.own)
        layer.forward(tape, graph=False)
        tape.drop(ACTIVATIONS, 2 * layer.own)
    if head is not None:
        head.forward(tape, graph=False)
    tape.drop(ACTIVATIONS, shared)


def _update(
    tape: Tape,
    kinds: list[tuple[LocalLayer, int]],
    head: _Head | None,
    training: Training,
    *,
    waiting: float,
    in_flight: float,
    pipeline: _Pipeline,
) -> None:
    """The last micro-batch's forward pass, while the others' activations wait, and its backward pass."""
    layer = kinds[-1][0]
    full = training.recompute == "full"
    kept = sum(_kept(each, training) * count for each, count in kinds)
    tape.at("forward")
    tape.hold(ACTIVATIONS, in_flight * kept - _kept(layer, training) + layer.own)
    tape.hold(ACTIVATIONS, 0.0 if head is not None and pipeline.chunks == 1 else (in_flight * pipeline.chunks - 1) * layer.own)
    remembered = pipeline.in_forward * layer.own
    tape.hold(TEMPORARY, remembered)
    layer.forward(tape, graph=not full)
    if head is None:
        tape.hold(TEMPORARY, layer.own)  # the gradient that arrives
    else:
        tape.at("head")
        head.forward(tape, graph=True)
        head.backward(tape)
    tape.drop(TEMPORARY, remembered)
    tape.hold(TEMPORARY, waiting + pipeline.in_backward * layer.own)
    for each, _ in kinds:
        tape.at("backward")
        if not full:
            if each is layer:
                each.backward(tape)
            continue
        each.forward(tape, graph=True, part=RECOMPUTED)
        each.backward(tape, part=RECOMPUTED)
        tape.drop(ACTIVATIONS, each.own)


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """What Megatron's schedules still refer to, beside outputs, which stay after they were sent.

    in_forward, in_backward: tensors between stages. The plain schedule remembers the latest of either direction; the interleaved one
    receives ahead, and lists what has been sent.
    """

    chunks: int
    in_forward: int
    in_backward: int

    @classmethod
    def of(cls, layout: ParallelLayout, chunks: tuple[Chunk, ...]) -> _Pipeline:
        if layout.pp == 1:
            return cls(1, 0, 0)
        first = chunks[0].embeds
        if layout.vpp is None:
            return cls(1, 2, 0 if first else 1)
        return cls(len(chunks), 2 if first else 6, 2 if first else 8)


class _Head:
    """The last norm, the vocabulary head and what the loss needs of it."""

    def __init__(self, shape: ModelShape, layout: ParallelLayout, training: Training, t: float) -> None:
        e, vocabulary = training.element_bytes, shape.vocab_size / layout.tp
        chunk = t if training.chunk_tokens is None else min(training.chunk_tokens, t)
        self._layer = local_layer(shape, layout, training, t, is_moe=False)
        self._element = e
        self._buffer = chunk * vocabulary * 4
        self._last_part = (t % chunk or chunk) / chunk
        self._exponentials = chunk * min(vocabulary, EXPONENTIALS) * 4
        self._weight = vocabulary * shape.hidden_size * 4
        self._rows = min(vocabulary, EXPONENTIALS) * shape.hidden_size * 4
        self._numbers = t * (40 + _TOP_TOKEN_KEPT * training.top_tokens)
        self._loss = t * _TOP_TOKEN_LOSS * training.top_tokens

    def forward(self, tape: Tape, *, graph: bool) -> None:
        """From the last layer's output, held under ACTIVATIONS where there is a graph."""
        layer, wide = self._layer, self._element != 4
        layer.norm_forward(tape, layer.own, TEMPORARY)
        of_all, of_own = 4 / self._element * layer.all, 4 / self._element * layer.own
        if wide:
            tape.hold(TEMPORARY, of_own)  # Megatron hands the model's output out in fp32
            tape.drop(TEMPORARY, layer.own)
        if layer.sequence_parallel:
            tape.hold(TEMPORARY, of_all)
        if wide:
            tape.hold(ACTIVATIONS, layer.all)
            if layer.sequence_parallel:
                tape.drop(TEMPORARY, of_all)
        tape.hold(LOGITS, self._buffer)
        tape.flash(LOGITS, 2 * self._exponentials)
        tape.drop(LOGITS, self._buffer)
        tape.hold(ACTIVATIONS, self._numbers)
        tape.drop(TEMPORARY, of_own)
        if not wide:
            if layer.sequence_parallel:
                tape.drop(TEMPORARY, of_all)
            tape.hold(ACTIVATIONS, layer.all)
        if graph:
            tape.flash(TEMPORARY, self._loss)
        else:
            tape.drop(ACTIVATIONS, layer.all + self._numbers)

    def backward(self, tape: Tape) -> None:
        """To the gradient of the last layer's output, held under TEMPORARY."""
        layer, wide = self._layer, self._element != 4
        tape.hold(TEMPORARY, layer.all)
        tape.hold(LOGITS, self._weight)
        tape.hold(LOGITS, self._buffer)
        if wide:
            tape.flash(LOGITS, self._buffer / 2 + self._rows)
            tape.flash(LOGITS, self._buffer / 2 * self._last_part + self._weight / 2)
        tape.drop(LOGITS, self._weight + self._buffer)
        tape.drop(ACTIVATIONS, layer.all + self._numbers)
        if wide:
            of_all, of_own = 4 / self._element * layer.all, 4 / self._element * layer.own
            tape.hold(TEMPORARY, of_all)
            tape.drop(TEMPORARY, layer.all)
            if layer.sequence_parallel:
                tape.hold(TEMPORARY, of_own)
                tape.drop(TEMPORARY, of_all)
                of_all = of_own
            tape.hold(TEMPORARY, layer.own)
            tape.drop(TEMPORARY, of_all)
        elif layer.sequence_parallel:
            tape.hold(TEMPORARY, layer.own)
            tape.drop(TEMPORARY, layer.all)
        layer.norm_backward(tape, layer.own)
        tape.drop(TEMPORARY, layer.own)
        tape.drop(ACTIVATIONS, layer.own)
