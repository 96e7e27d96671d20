"""Which layers and parameters each pipeline rank holds, and how Megatron's flat buffers pack and shard them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from parallel.layout import ParallelLayout
from parallel.planner.shape import ModelShape

# Megatron's _ParamAndGradBuffer: every parameter starts at a multiple of 64 elements, every bucket ends at one of lcm(ranks, 128).
_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A consecutive range of layers, [first, last), with what stands at the model's ends."""

    first: int
    last: int
    embeds: bool
    ends: bool  # final norm, head and extra-token layers

    @property
    def num_layers(self) -> int:
        return self.last - self.first


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
    """Raise ValueError naming the first rule that this model breaks on this layout: those of ParallelLayout.check_model.

    One is wider: where pp*vpp does not divide the layers but divides layers + 2, embedding and head count as a layer each.
    """
    chunks = layout.pp * (layout.vpp or 1)
    rules = [
        (_layers_per_chunk(shape, chunks) is not None, f"pp*vpp={chunks} does not divide {shape.num_layers} layers"),
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


def is_even(shape: ModelShape, layout: ParallelLayout) -> bool:
    """Whether every chunk has as many layers; this project's actor trains only such."""
    return shape.num_layers % (layout.pp * (layout.vpp or 1)) == 0


def _layers_per_chunk(shape: ModelShape, chunks: int) -> tuple[int, ...] | None:
    """Layers of every chunk in order; None where no rule gives an assignment."""
    layers = shape.num_layers
    if layers % chunks == 0:
        return (layers // chunks,) * chunks
    if (layers + 2) % chunks == 0 and (layers + 2) // chunks >= 2:
        middle = (layers + 2) // chunks
        return (middle - 1, *(middle,) * (chunks - 2), middle - 1)
    if shape.mtp_layers and chunks > 1:
        # DeepSeek-V3's recipes fill chunks from the front; the last has fewer layers, the extra-token layer and the heads.
        full = -(-layers // chunks)
        if layers > full * (chunks - 1):
            return (*(full,) * (chunks - 1), layers - full * (chunks - 1))
    return None


def chunks_of_rank(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> tuple[Chunk, ...]:
    """The chunks of pipeline rank pp_rank, one per virtual stage: chunks pp_rank, pp_rank + pp, ... of the model."""
    count = layout.pp * (layout.vpp or 1)
    sizes = _layers_per_chunk(shape, count)
    assert sizes is not None, "check_layout comes first"
    starts = [sum(sizes[:index]) for index in range(count)]
    return tuple(
        Chunk(first=starts[index], last=starts[index] + sizes[index], embeds=index == 0, ends=index == count - 1)
        for index in range(pp_rank, count, layout.pp)
    )


def _tensors(shape: ModelShape, layout: ParallelLayout, chunk: Chunk) -> Iterator[tuple[int, bool, bool]]:
    """Elements of this rank's shard, whether it is an expert's, whether it is a tied embedding; in the order of the module."""
    hidden = shape.hidden_size
    vocabulary = shape.vocab_size // layout.tp * hidden
    tied_copy = shape.tied and layout.pp > 1
    if chunk.embeds:
        yield vocabulary, False, tied_copy
    layers = list(range(chunk.first, chunk.last))
    if chunk.ends:
        layers += [shape.num_layers] * shape.mtp_layers
    for layer in layers:
        yield hidden, False, False
        for weight in shape.attention:
            yield weight.numel // (layout.tp if weight.split else 1), False, False
        yield hidden, False, False
        if layer < shape.num_dense_layers:
            yield 2 * shape.dense_ffn // layout.tp * hidden, False, False
            yield hidden * shape.dense_ffn // layout.tp, False, False
            continue
        yield shape.num_experts * hidden, False, False
        for _ in range(shape.num_experts // layout.ep):
            yield 2 * shape.expert_ffn // layout.etp * hidden, True, False
            yield hidden * shape.expert_ffn // layout.etp, True, False
        if shape.shared_ffn:
            yield 2 * shape.shared_ffn // layout.tp * hidden, False, False
            yield hidden * shape.shared_ffn // layout.tp, False, False
    if chunk.ends:
        for _ in range(shape.mtp_layers):
            yield 2 * hidden * hidden // layout.tp + 3 * hidden, False, False
        yield hidden, False, False
        if not shape.tied or layout.pp > 1:
            yield vocabulary, False, tied_copy


@dataclass(frozen=True, slots=True)
class _Buffer:
    """Where each parameter lies, [start, end) in elements, and the buckets, each sharded on its own."""

    parameters: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]

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
    return _Buffer(tuple(parameters), tuple(buckets))


@lru_cache(maxsize=4096)
def _buffers(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> tuple[tuple[_Buffer, ...], tuple[_Buffer, ...]]:
    """Dense and expert buffers, one each per chunk that has such parameters."""
    dense: list[_Buffer] = []
    expert: list[_Buffer] = []
    for chunk in chunks_of_rank(shape, layout, pp_rank):
        tensors = list(_tensors(shape, layout, chunk))
        for found, is_expert, ranks in ((dense, False, layout.dp * layout.cp), (expert, True, layout.edp)):
            mine = [(numel, tied) for numel, of_expert, tied in tensors if of_expert == is_expert]
            if mine:
                found.append(_pack(mine, ranks))
    return tuple(dense), tuple(expert)


@lru_cache(maxsize=65536)
def stage_parameters(shape: ModelShape, layout: ParallelLayout, pp_rank: int) -> StageParameters:
    """Counts of one pipeline rank's parameters and of the flat buffers that hold them."""
    dense, expert = _buffers(shape, layout, pp_rank)

    def numel(buffers: tuple[_Buffer, ...]) -> int:
        return sum(end - start for buffer in buffers for start, end in buffer.parameters)

    return StageParameters(
        dense=numel(dense),
        expert=numel(expert),
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
