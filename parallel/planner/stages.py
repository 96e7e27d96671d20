"""Which parameters each pipeline rank holds, and how Megatron's flat buffers pack and shard them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from parallel.layout import ParallelLayout
from parallel.planner.shape import ModelShape
from parallel.stages import Chunk

# Megatron's _ParamAndGradBuffer: every parameter starts at a multiple of 64 elements, every bucket ends at one of lcm(ranks, 128).
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParameters:
    """One pipeline rank's parameters, as counts of this rank's shards. Buffers include Megatron's padding."""

    dense: int
    expert: int
    dense_buffer: int
    expert_buffer: int

    @property
    def numel(self) -> int:
        return self.dense + self.expert

    @property
    def buffer(self) -> int:
        return self.dense_buffer + self.expert_buffer


def check_layout(shape: ModelShape, layout: ParallelLayout) -> None:
    """Raise ValueError naming the first rule that this model breaks on this layout: those of ParallelLayout.check_model."""
    chunks_of_rank(shape, layout, 0)
    rules = [
        (shape.num_heads % layout.tp == 0, f"tp={layout.tp} does not divide {shape.num_heads} attention heads"),
        (shape.num_kv_heads % layout.tp == 0, f"tp={layout.tp} does not divide {shape.num_kv_heads} key-value heads"),
        (shape.vocab_size % layout.tp == 0, f"tp={layout.tp} does not divide the vocabulary of {shape.vocab_size}"),
        (shape.hidden_size % layout.tp == 0, f"tp={layout.tp} does not divide hidden size {shape.hidden_size}"),
    ]
    if shape.is_moe:
        rules += [
            (shape.num_experts % layout.ep == 0, f"ep={layout.ep} does not divide {shape.num_experts} experts"),
            (
                shape.expert_ffn % layout.etp == 0,
                f"etp={layout.etp} does not divide expert intermediate size {shape.expert_ffn}",
            ),
            (
                layout.tp == 1 or layout.sequence_parallel,
                f"tp={layout.tp} with a mixture-of-experts model needs sequence_parallel=true",
            ),
        ]
    else:
        rules += [
            (layout.ep == 1, f"ep={layout.ep} needs a mixture-of-experts model, this one is dense"),
            (layout.etp == 1, f"etp={layout.etp} needs a mixture-of-experts model, this one is dense"),
            (shape.dense_ffn % layout.tp == 0, f"tp={layout.tp} does not divide intermediate size {shape.dense_ffn}"),
        ]
    for holds, message in rules:
        if not holds:
            raise ValueError(f"parallel: {message}")


def chunks_of_rank(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> tuple[Chunk, ...]:
    """The chunks of one pipeline rank, one per virtual stage."""
    return layout.chunks_of_rank(shape.num_layers, pp_rank)


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a layout makes of tensors. staged: several pipeline ranks, so a tied head has a copy of its own."""

    tp: int
    ep: int
    etp: int
    staged: bool


def _tensors(shape: ModelShape, cut: _Cut, chunk: Chunk) -> Iterator[tuple[int, bool, bool]]:
    """Elements of this rank's shard, whether it is an expert's, whether it is a tied embedding; in the order of the module."""
    hidden = shape.hidden_size
    vocabulary = shape.vocab_size // cut.tp * hidden
    tied_copy = shape.tied and cut.staged
    if chunk.embeds:
        yield vocabulary, False, tied_copy
    layers = list(range(chunk.first, chunk.last))
    if chunk.ends:
        layers += [shape.num_layers] * shape.mtp_layers
    for layer in layers:
        yield hidden, False, False
        for weight in shape.attention:
            yield weight.numel // (cut.tp if weight.split else 1), False, False
        yield hidden, False, False
        if layer < shape.num_dense_layers:
            yield 2 * shape.dense_ffn // cut.tp * hidden, False, False
            yield hidden * shape.dense_ffn // cut.tp, False, False
            continue
        yield shape.num_experts * hidden, False, False
        for _ in range(shape.num_experts // cut.ep):
            yield 2 * shape.expert_ffn // cut.etp * hidden, True, False
            yield hidden * shape.expert_ffn // cut.etp, True, False
        if shape.shared_ffn:
            yield 2 * shape.shared_ffn // cut.tp * hidden, False, False
            yield hidden * shape.shared_ffn // cut.tp, False, False
    if chunk.ends:
        for _ in range(shape.mtp_layers):
            yield 2 * hidden * hidden // cut.tp + 3 * hidden, False, False
        yield hidden, False, False
        if not shape.tied or cut.staged:
            yield vocabulary, False, tied_copy


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Where each parameter lies, [start, end) in elements, and the buckets, each sharded on its own."""

    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

    held: int  # elements of all parameters

    @property
    def numel(self) -> int:
        return self.buckets[-1][1] if self.buckets else 0


def _pack(tensors: Sequence[tuple[int, bool]], ranks: int) -> _Buffer:
    """Megatron's packing of (elements, has a bucket of its own), last parameter first, without overlapped reduction: one bucket."""
    align = math.lcm(ranks, _BUCKET_ALIGNMENT)
    parameters: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    start, position, filled = 0, 0, False

    def close(end: int) -> int:
        padded = -(-end // align) * align
        buckets.append((start, padded))
        return padded

    for numel, alone in reversed(tensors):
        position = -(-position // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT
        if alone and filled:
            start = position = close(position)
        parameters.append((position, position + numel))
        position += numel
        filled = True
        if alone:
            start = position = close(position)
            filled = False
    if filled:
        close(position)
    return _Buffer(tuple(parameters), tuple(buckets), sum(numel for numel, _ in tensors))


@lru_cache(maxsize=4096)
def _chunk_buffers(
    shape: ModelShape, cut: _Cut, chunk: Chunk, dense_ranks: int, expert_ranks: int
) -> tuple[_Buffer | None, _Buffer | None]:
    """The dense and the expert buffer of one chunk; None without such parameters."""
    tensors = list(_tensors(shape, cut, chunk))
    dense = [(numel, tied) for numel, of_expert, tied in tensors if not of_expert]
    expert = [(numel, tied) for numel, of_expert, tied in tensors if of_expert]
    return _pack(dense, dense_ranks) if dense else None, _pack(expert, expert_ranks) if expert else None


def _buffers(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> tuple[tuple[_Buffer, ...], tuple[_Buffer, ...]]:
    """Dense and expert buffers, one each per chunk that has such parameters."""
    cut = _Cut(layout.tp, layout.ep, layout.etp, layout.pp > 1)
    found = [
        _chunk_buffers(shape, cut, _first_alike(shape, chunk), layout.dp * layout.cp, layout.edp)
        for chunk in chunks_of_rank(shape, layout, pp_rank)
    ]
    return tuple(dense for dense, _ in found if dense is not None), tuple(expert for _, expert in found if expert is not None)


def _first_alike(shape: ModelShape, chunk: Chunk) -> Chunk:
    """One chunk for all that hold as many dense layers and as many others: they have the same tensors."""
    dense = max(0, min(chunk.last, shape.num_dense_layers) - chunk.first)
    first = shape.num_dense_layers - dense
    return replace(chunk, first=first, last=first + chunk.num_layers)


@lru_cache(maxsize=65536)
def stage_parameters(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> StageParameters:
    """Counts of one pipeline rank's parameters and of the flat buffers that hold them."""
    dense, expert = _buffers(shape, layout, pp_rank)
    return StageParameters(
        dense=sum(buffer.held for buffer in dense),
        expert=sum(buffer.held for buffer in expert),
        dense_buffer=sum(buffer.numel for buffer in dense),
        expert_buffer=sum(buffer.numel for buffer in expert),
    )


def largest_gradient(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> int:
    """Elements of the largest gradient that a rank's shard of the optimizer may hold."""
    dense, expert = _buffers(shape, layout, pp_rank)
    return max(
        min(end - start, (bucket_end - bucket_start) // ranks)
        for buffers, ranks in ((dense, layout.dp * layout.cp), (expert, layout.edp))
        for buffer in buffers
        for bucket_start, bucket_end in buffer.buckets
        for start, end in buffer.parameters
        if bucket_start <= start < bucket_end
    )


def optimizer_shard(shape: ModelShape, layout: ParallelLayout, rank: int) -> tuple[int, int]:
    """Elements, and pieces of parameters, whose optimizer state this rank keeps: its slice of every bucket, padding left out."""
    place = layout.coordinates(rank)
    dense, expert = _buffers(shape, layout, place.pp)
    elements = pieces = 0
    for buffers, ranks, index in ((dense, layout.dp * layout.cp, place.dp * layout.cp + place.cp), (expert, layout.edp, place.edp)):
        for buffer in buffers:
            for bucket_start, bucket_end in buffer.buckets:
                size = (bucket_end - bucket_start) // ranks
                low, high = bucket_start + index * size, bucket_start + (index + 1) * size
                for start, end in buffer.parameters:
                    shared = min(end, high) - max(start, low)
                    if shared > 0:
                        elements += shared
                        pieces += 1
    return elements, pieces
