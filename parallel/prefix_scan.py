"""Segmented prefix scans over packed sequences whose tokens are spread over context-parallel ranks.

Every statistic here is associative, so each rank scans its own chunks, sends one number per chunk, sequence and column, and folds what lies
before its chunks into its local result. All requests of one call share **one** all-gather of [local chunks, S, columns] fp32 numbers;
with one rank there is none. No result carries a gradient, so nothing is exchanged in backward.

`gather_summaries` alone communicates. All ranks of the group must call `scan` with the same requests, also those that hold nothing but
padding.

A masked token is the identity of its statistic *before* any arithmetic, so NaN and infinity at masked positions change nothing. A statistic
of no token at all is 0: as a log ratio, that is the ratio 1 of the empty product.

Shapes: T local packed tokens, S sequences, C columns (one per number that a request exchanges), N local chunks of a sequence (1, or 2
under zigzag), R rows of L tokens and K items of their skeleton (token_rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor

from parallel.running_sum import running_sum
from parallel.sequence_shard import SequenceShard

_INF = float("inf")


@dataclass(frozen=True, eq=False)
class PrefixMin:
    """Minimum of x over the *earlier* unmasked tokens of the sequence (i < t): -> [T]. Not capped; 0 where there is no earlier one."""

    x_T: Float32[Tensor, " T"]
    mask_T: Bool[Tensor, " T"]


@dataclass(frozen=True, eq=False)
class PrefixSum:
    """Sum of x over the unmasked tokens i <= t of the sequence, or i < t if exclusive: -> [T]."""

    x_T: Float32[Tensor, " T"]
    mask_T: Bool[Tensor, " T"]
    exclusive: bool = False


@dataclass(frozen=True, eq=False)
class PrefixMoment:
    """Sum of n_i x_i over the *earlier* unmasked tokens i < t of the sequence, n_i = how many unmasked tokens lie before i: -> [T].

    With an exclusive PrefixSum it gives every sum whose weights are linear in the token's place. x is finite where the mask is True.
    """

    x_T: Float32[Tensor, " T"]
    mask_T: Bool[Tensor, " T"]


@dataclass(frozen=True, eq=False)
class PrefixDecayedSum:
    """y_t = decay y_{t-1} + x_t over the unmasked tokens of the sequence, y = 0 before the first: -> [T]. A masked token keeps y.

    0 <= decay < 1. x is finite where the mask is True.
    """

    x_T: Float32[Tensor, " T"]
    mask_T: Bool[Tensor, " T"]
    decay: float


@dataclass(frozen=True, eq=False)
class SequenceSum:
    """Sum of x over the unmasked tokens of each sequence: -> [S], the same on every rank. `shard.per_token` spreads it to [T]."""

    x_T: Float32[Tensor, " T"]
    mask_T: Bool[Tensor, " T"]


Request = PrefixMin | PrefixSum | PrefixMoment | PrefixDecayedSum | SequenceSum


@dataclass(frozen=True, eq=False)
class LocalScan:
    """One request after its local pass."""

    summary: Float32[Tensor, "N S columns"]  # columns of this request: what other ranks must know
    running_T: Float[Tensor, "*rows T"]  # the scan inside each local chunk, as the request asks; empty for per-sequence requests


def scan(shard: SequenceShard, requests: Sequence[Request]) -> list[Float32[Tensor, " _"]]:
    """Answer every request, fp32, in order: [T] for prefix requests, [S] for sequence requests. One collective in all, none at cp_size = 1.

    Sums run in float64 inside a rank and are rounded to fp32 once per chunk; minima and maxima are exact. Cost is linear in tokens.
    Raises ValueError, before the collective, for a tensor that is not fp32 [T] or a mask that is not bool [T].
    """
    if not requests:
        return []
    local = local_scan(shard, requests)
    summaries = torch.cat([one.summary for one in local], dim=-1)
    return fold(shard, requests, local, gather_summaries(shard, summaries))


def gather_summaries(shard: SequenceShard, summaries: Float32[Tensor, "N S C"]) -> Float32[Tensor, "num_chunks S C"]:
    """Every rank's chunk summaries in sequence order: [N, S, C] -> [num_chunks, S, C]. The one collective; none at cp_size = 1."""
    if shard.cp_size == 1:
        return summaries
    gathered = summaries.new_empty(shard.cp_size * summaries.numel())
    dist.all_gather_into_tensor(gathered, summaries.reshape(-1), group=shard.require_group())
    return in_sequence_order(gathered.view(shard.cp_size, *summaries.shape))


def in_sequence_order(gathered: Shaped[Tensor, "cp 2 S C"]) -> Shaped[Tensor, "2*cp S C"]:
    """Undo the zigzag: [cp, 2, S, C] by rank -> [2 * cp, S, C] by position in the sequence."""
    return torch.cat([gathered[:, 0], gathered[:, 1].flip(0)])


def local_scan(shard: SequenceShard, requests: Sequence[Request]) -> list[LocalScan]:
    """The pass over this rank's own tokens. Pure; raises ValueError as `scan` does."""
    return [_local(shard, _checked(shard, request, i)) for i, request in enumerate(requests)]


def fold(
    shard: SequenceShard, requests: Sequence[Request], local: Sequence[LocalScan], chunk_summaries: Float32[Tensor, "num_chunks S C"]
) -> list[Float32[Tensor, " _"]]:
    """Join local scans with the summaries of all chunks, [num_chunks, S, C] in sequence order. Writes over `local`."""
    columns = chunk_summaries.split([one.summary.shape[-1] for one in local], dim=-1)
    return [_fold(shard, request, one, chunks) for request, one, chunks in zip(requests, local, columns, strict=True)]


def _checked(shard: SequenceShard, request: Request, index: int) -> Request:
    name, shape = f"request {index} ({type(request).__name__})", (shard.num_local_tokens,)
    for field, x, dtype in (("x_T", request.x_T, torch.float32), ("mask_T", request.mask_T, torch.bool)):
        if x.dtype != dtype or tuple(x.shape) != shape:
            raise ValueError(f"{name}: {field} must be {dtype} of shape {shape}, got {x.dtype} of shape {tuple(x.shape)}")
    return request


def _local(shard: SequenceShard, request: Request) -> LocalScan:
    x_T, mask_T = request.x_T.detach(), request.mask_T
    match request:
        case PrefixMin() | PrefixSum():
            identity, exclusive = (_INF, True) if isinstance(request, PrefixMin) else (0.0, request.exclusive)
            x_RL = _masked_rows(shard, x_T, mask_T, identity, shift=int(exclusive))
            running_T = _running_min(shard, x_RL) if isinstance(request, PrefixMin) else _running_sum(shard, x_RL)
            if shard.num_chunks == 1:
                return LocalScan(x_T.new_empty(1, shard.num_sequences, 0), running_T)  # nothing lies before a sequence's only chunk
            last = shard.chunk_starts[1:] - 1
            totals = running_T[last]
            if exclusive:
                join = torch.minimum if isinstance(request, PrefixMin) else torch.add
                totals = join(totals, torch.where(mask_T[last], x_T[last], identity))
            return LocalScan(_columns(shard, totals), running_T)
        case PrefixMoment():
            ones_T = torch.ones_like(x_T)
            place_T = _running_sum(shard, _masked_rows(shard, ones_T, mask_T, 0.0, shift=1))  # in its chunk, from 0
            placed_T = place_T.float() * x_T
            running_2T = torch.stack([_running_sum(shard, _masked_rows(shard, y_T, mask_T, 0.0, shift=1)) for y_T in (placed_T, x_T)])
            if shard.num_chunks == 1:
                return LocalScan(x_T.new_empty(1, shard.num_sequences, 0), running_2T)
            totals_3 = [_chunk_sum(shard, y_T, mask_T) for y_T in (ones_T, x_T, placed_T)]
            return LocalScan(_columns(shard, *totals_3), running_2T)
        case PrefixDecayedSum():
            count_T = _running_sum(shard, _masked_rows(shard, torch.ones_like(x_T), mask_T, 0.0))
            running_2T = torch.stack([_running_decayed_sum(shard, x_T, mask_T, request.decay), count_T])
            if shard.num_chunks == 1:
                return LocalScan(x_T.new_empty(1, shard.num_sequences, 0), running_2T)
            return LocalScan(_columns(shard, *running_2T[:, shard.chunk_starts[1:] - 1]), running_2T)
        case SequenceSum():
            return LocalScan(_columns(shard, _chunk_sum(shard, x_T, mask_T)), x_T[:0])


def _fold(shard: SequenceShard, request: Request, local: LocalScan, chunks: Tensor) -> Tensor:
    match request:
        case PrefixMin():
            minimum_T = local.running_T
            if shard.num_chunks > 1:
                before_T = _per_token(shard, torch.stack([_min(chunks[:j, :, 0]) for j in shard.chunk_indices]))
                minimum_T = torch.minimum(before_T, minimum_T, out=minimum_T)
            return minimum_T.nan_to_num_(nan=torch.nan, posinf=0.0, neginf=-_INF)  # no earlier token: +inf, becomes 0
        case PrefixSum():
            sum_T = local.running_T
            if shard.num_chunks > 1:
                sum_T = sum_T + _per_token(shard, torch.stack([chunks[:j, :, 0].double().sum(0) for j in shard.chunk_indices]))
            return sum_T.float()
        case PrefixMoment():
            moment_T, sum_T = local.running_T
            if shard.num_chunks > 1:
                count, total, moment = chunks.double().unbind(-1)
                count_before = torch.stack([count[:j].sum(0) for j in range(shard.num_chunks)])
                moment = moment + count_before * total
                before = torch.stack([moment[:j].sum(0) for j in shard.chunk_indices])
                count_T = _per_token(shard, count_before[list(shard.chunk_indices)])
                moment_T = moment_T + count_T * sum_T + _per_token(shard, before)
            return moment_T.float()
        case PrefixDecayedSum():
            sum_T, count_T = local.running_T
            if shard.num_chunks > 1:
                value, count = chunks.double().unbind(-1)
                carried = [torch.zeros_like(value[0])]
                for j in range(shard.num_chunks - 1):
                    carried.append(carried[j] * request.decay ** count[j] + value[j])
                before = torch.stack([carried[j] for j in shard.chunk_indices])
                sum_T = sum_T + request.decay**count_T * _per_token(shard, before)
            return sum_T.float()
        case SequenceSum():
            return chunks[..., 0].double().sum(0).float()


def _columns(shard: SequenceShard, *values: Tensor) -> Tensor:
    """Values of every local chunk, ordered as tokens are (sequence, then chunk) -> [N, S, columns] fp32."""
    stacked = torch.stack([value.float() for value in values], dim=-1)
    return stacked.view(shard.num_sequences, len(shard.chunk_indices), len(values)).transpose(0, 1)


def _per_token(shard: SequenceShard, by_chunk: Tensor) -> Tensor:
    """[N, S] -> [T]."""
    return by_chunk.transpose(0, 1).reshape(-1).index_select(0, shard.chunk_id_T)


def _min(x: Tensor) -> Tensor:
    """Minimum over the first axis, +inf over an empty one."""
    return x.amin(0) if len(x) else x.new_full(x.shape[1:], _INF)


def _masked_rows(shard: SequenceShard, x_T: Tensor, mask_T: Tensor, identity: float, *, shift: int = 0) -> Tensor:
    """x where the mask is True, else the identity, whatever x holds there, in rows: -> [R, L], the last filled up with the identity.

    shift = 1 moves every token to its right neighbour's place, which makes inclusive scans exclusive: the first of a chunk gets the
    identity. By bits, (x - identity) * mask + identity in integers that wrap around, because torch.where takes three times as long on a
    CPU, longer than the scan.
    """
    num_tokens, rows = len(x_T), shard.rows
    bits = int(torch.tensor(identity, dtype=torch.float32).view(torch.int32))
    masked = torch.empty(rows.num_rows * rows.row_length, dtype=torch.int32, device=x_T.device)
    moved = masked[shift:num_tokens]
    torch.sub(x_T.view(torch.int32)[: num_tokens - shift], bits, out=moved)
    moved.mul_(mask_T[: num_tokens - shift].to(torch.int32)).add_(bits)
    masked[num_tokens:] = bits
    if shift:
        masked.index_fill_(0, shard.chunk_starts[:-1], bits)
    return masked.view(torch.float32).view(rows.num_rows, rows.row_length)


def _running_min(shard: SequenceShard, x_RL: Tensor) -> Tensor:
    """Inclusive running minimum inside each local chunk: [R, L] -> [T]. Exact; linear in tokens, however many and uneven the chunks are.

    All rows at once, as if none held a second chunk; then the skeleton, which restarts at every chunk, gives each row what its chunk
    brings along, and the late tokens their values.
    """
    rows = shard.rows
    if rows.row_length == 1:
        return _restarting_min(x_RL.view(-1), rows.key_K)
    running_RL = x_RL.cummin(1).values
    running_T = running_RL.view(-1)
    items_K = x_RL.view(-1).index_select(0, rows.token_K)
    items_K.index_copy_(0, rows.summary_R, running_T.index_select(0, rows.summary_token_R))
    skeleton_K = _restarting_min(items_K, rows.key_K)
    carried_R = torch.where(rows.continues_R, skeleton_K.index_select(0, rows.before_R), _INF)
    torch.minimum(running_RL, carried_R[:, None], out=running_RL)
    running_T.scatter_(0, rows.late_token_D, skeleton_K.index_select(0, rows.late_D))
    return running_T[: shard.num_local_tokens]


def _restarting_min(x_K: Tensor, key_K: Tensor) -> Tensor:
    """Inclusive running minimum of fp32 numbers that restarts wherever `key_K` falls (see TokenRows). Exact; skips NaN.

    x, mapped so that integers order as floats do, goes into the key's lower 32 bits. Then every number of a later chunk is below all of
    earlier ones, so one running minimum restarts by itself. They are positive and are compared as the float64 numbers with the same
    bits, whose order is the same: on a CPU this takes a third less time.
    """
    keys_K = _float_order(x_K.view(torch.int32)).long().add_(key_K)
    smallest_K = keys_K.view(torch.float64).cummin(0).values.view(torch.int64)
    return _float_order(smallest_K.int()).view(torch.float32)


def _float_order(bits: Tensor) -> Tensor:
    """fp32 bit patterns <-> int32 in the same order as the floats (its own inverse)."""
    return (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)


def _running_sum(shard: SequenceShard, x_RL: Tensor) -> Tensor:
    """Inclusive running sum inside each local chunk: [R, L] -> float64 [T].

    One running sum over everything, minus its value before the chunk. In float64 this costs at most 2**-52 of the sum of all |x| of
    the rank, which for log ratios lies far below fp32; in fp32 it would lose the digits of every later sequence.
    """
    running_T = running_sum(x_RL.view(-1)[: shard.num_local_tokens])
    before = torch.cat([running_T.new_zeros(1), running_T[shard.chunk_starts[1:-1] - 1]])
    return running_T.sub_(before.index_select(0, shard.chunk_id_T))


def _running_decayed_sum(shard: SequenceShard, x_T: Tensor, mask_T: Tensor, decay: float) -> Tensor:
    """y_t = decay y_{t-1} + x_t inside each local chunk: [T] -> float64 [T]. log2(longest chunk) passes, each joins twice as many tokens.

    It never divides by a power of the decay, which would overflow after some thousand tokens.
    """
    y_T = torch.where(mask_T, x_T, 0.0).double()
    factor_T = torch.ones_like(y_T).masked_fill(mask_T, decay)  # float64: torch.where of two numbers rounds them to fp32
    factor_T.index_fill_(0, shard.chunk_starts[:-1], 0.0)  # nothing comes from before a chunk
    joined = 1
    while joined < max(shard.padded_lengths, default=0) // shard.num_chunks:
        y_T = torch.cat([y_T[:joined], y_T[joined:] + factor_T[joined:] * y_T[:-joined]])
        factor_T = torch.cat([factor_T[:joined], factor_T[joined:] * factor_T[:-joined]])
        joined *= 2
    return y_T


def _chunk_sum(shard: SequenceShard, x_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sum over the unmasked tokens of every local chunk, float64 [N * S], each chunk by itself."""
    rows = shard.rows
    x_RL = _masked_rows(shard, x_T, mask_T, 0.0)
    if rows.row_length == 1:
        items_K = x_RL.view(-1).double()
    else:
        items_K = x_RL.view(-1).index_select(0, rows.token_K).double()
        x_RL.view(-1).index_fill_(0, rows.late_token_D, 0.0)
        items_K.index_copy_(0, rows.summary_R, x_RL.sum(1, dtype=torch.float64))
    return torch.segment_reduce(items_K, "sum", offsets=rows.item_starts)
