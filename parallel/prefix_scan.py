"""Segmented prefix scans over packed sequences whose tokens are spread over context-parallel ranks.

Every statistic here is associative, so each rank scans its own chunks, sends one number per chunk, sequence and column, and folds what lies
before its chunks into its local result. All requests of one call share **one** all-gather of [local chunks, S, columns] fp32 numbers;
with one rank there is none. No result carries a gradient, so nothing is exchanged in backward.

`local_scan` and `fold` are pure; `gather_summaries` alone communicates. All ranks of the group must call `scan` with the same requests,
also those that hold nothing but padding.

A masked token is the identity of its statistic *before* any arithmetic, so NaN and infinity at masked positions change nothing. A statistic
of no token at all is 0: as a log ratio, that is the ratio 1 of the empty product.

Shapes: T local packed tokens, S sequences, C columns (one per number that a request exchanges), N local chunks (1, or 2 under zigzag), R
rows of L = _ROW tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sequence_shard import SequenceShard

_INF = float("inf")
_ROW = 512  # tokens of a row of the running minimum: long enough to be few, short enough to be many at once


@dataclass(frozen=True, eq=False)
class PrefixMin:
    """Minimum of x over the *earlier* unmasked tokens of the sequence (i < t): -> [T]. Not capped; 0 where there is no earlier one."""

    x_T: Tensor  # fp32
    mask_T: Tensor  # bool


@dataclass(frozen=True, eq=False)
class PrefixSum:
    """Sum of x over the unmasked tokens i <= t of the sequence, or i < t if exclusive: -> [T]."""

    x_T: Tensor
    mask_T: Tensor
    exclusive: bool = False


@dataclass(frozen=True, eq=False)
class SequenceSum:
    """Sum of x over the unmasked tokens of each sequence: -> [S], the same on every rank. `shard.per_token` spreads it to [T]."""

    x_T: Tensor
    mask_T: Tensor


@dataclass(frozen=True, eq=False)
class SequenceMean:
    """Mean of x over the unmasked tokens of each sequence: -> [S], the same on every rank."""

    x_T: Tensor
    mask_T: Tensor


@dataclass(frozen=True, eq=False)
class SequenceMax:
    """Maximum of x over the unmasked tokens of each sequence: -> [S], the same on every rank."""

    x_T: Tensor
    mask_T: Tensor


Request = PrefixMin | PrefixSum | SequenceSum | SequenceMean | SequenceMax


@dataclass(frozen=True, eq=False)
class LocalScan:
    """One request after its local pass."""

    summary: Tensor  # fp32 [N, S, columns of this request]: what other ranks must know
    running_T: Tensor  # the inclusive scan inside each local chunk, [T]; empty for per-sequence requests


def scan(shard: SequenceShard, requests: Sequence[Request]) -> list[Tensor]:
    """Answer every request, fp32, in order: [T] for prefix requests, [S] for sequence requests. One collective in all, none at cp_size = 1.

    Sums run in float64 inside a rank and are rounded to fp32 once per chunk; minima and maxima are exact. Cost is linear in tokens.
    Raises ValueError, before the collective, for a tensor that is not fp32 [T] or a mask that is not bool [T].
    """
    if not requests:
        return []
    local = local_scan(shard, requests)
    summaries = torch.cat([one.summary for one in local], dim=-1)
    return fold(shard, requests, local, gather_summaries(shard, summaries))


def gather_summaries(shard: SequenceShard, summaries: Tensor) -> Tensor:
    """Every rank's chunk summaries in sequence order: [N, S, C] -> [num_chunks, S, C]. The one collective; none at cp_size = 1."""
    if shard.cp_size == 1:
        return summaries
    gathered = summaries.new_empty(shard.cp_size * summaries.numel())
    dist.all_gather_into_tensor(gathered, summaries.reshape(-1), group=shard.require_group())
    return in_sequence_order(gathered.view(shard.cp_size, *summaries.shape))


def in_sequence_order(gathered: Tensor) -> Tensor:
    """Undo the zigzag: [cp, 2, S, C] by rank -> [2 * cp, S, C] by position in the sequence."""
    return torch.cat([gathered[:, 0], gathered[:, 1].flip(0)])


def local_scan(shard: SequenceShard, requests: Sequence[Request]) -> list[LocalScan]:
    """The pass over this rank's own tokens. Pure; raises ValueError as `scan` does."""
    return [_local(shard, _checked(shard, request, i)) for i, request in enumerate(requests)]


def fold(shard: SequenceShard, requests: Sequence[Request], local: Sequence[LocalScan], chunk_summaries: Tensor) -> list[Tensor]:
    """Join local scans with the summaries of all chunks, [num_chunks, S, C] in sequence order. Pure."""
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
        case PrefixMin():
            running_T = _running_min(shard, _select(x_T, mask_T, _INF))
            return LocalScan(_columns(shard, running_T[shard.chunk_starts[1:] - 1]), running_T)
        case PrefixSum():
            running_T = _running_sum(shard, _select(x_T, mask_T, 0.0))
            return LocalScan(_columns(shard, running_T[shard.chunk_starts[1:] - 1]), running_T)
        case SequenceSum():
            return LocalScan(_columns(shard, _chunk_reduce(shard, _select(x_T, mask_T, 0.0), "sum")), x_T[:0])
        case SequenceMean():
            totals = _chunk_reduce(shard, _select(x_T, mask_T, 0.0), "sum")
            counts = _chunk_reduce(shard, mask_T, "sum")
            return LocalScan(_columns(shard, totals, counts), x_T[:0])
        case SequenceMax():
            return LocalScan(_columns(shard, _chunk_reduce(shard, _select(x_T, mask_T, -_INF), "max")), x_T[:0])


def _fold(shard: SequenceShard, request: Request, local: LocalScan, chunks: Tensor) -> Tensor:
    match request:
        case PrefixMin():
            minimum_T = _shift_right(shard, local.running_T, _INF)
            if shard.num_chunks > 1:
                before_T = _per_token(shard, torch.stack([_min(chunks[:j, :, 0]) for j in shard.chunk_indices]))
                minimum_T = torch.minimum(before_T, minimum_T)
            return minimum_T.nan_to_num(nan=torch.nan, posinf=0.0, neginf=-_INF)  # no earlier token: +inf, becomes 0
        case PrefixSum():
            sum_T = _shift_right(shard, local.running_T, 0.0) if request.exclusive else local.running_T
            if shard.num_chunks > 1:
                sum_T = sum_T + _per_token(shard, torch.stack([chunks[:j, :, 0].double().sum(0) for j in shard.chunk_indices]))
            return sum_T.float()
        case SequenceSum():
            return chunks[..., 0].double().sum(0).float()
        case SequenceMean():
            total_S, count_S = chunks.double().sum(0).unbind(-1)
            return (total_S / count_S.clamp(min=1)).float()
        case SequenceMax():
            maximum_S = chunks[..., 0].amax(0)
            return torch.where(maximum_S == -_INF, 0.0, maximum_S)


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


def _shift_right(shard: SequenceShard, x_T: Tensor, first: float) -> Tensor:
    """Inclusive to exclusive: every token takes its left neighbour's value, the first of a chunk takes `first`."""
    shifted_T = torch.roll(x_T, 1)
    shifted_T[shard.chunk_starts[:-1]] = first
    return shifted_T


def _select(x_T: Tensor, mask_T: Tensor, identity: float) -> Tensor:
    """x where the mask is True, else the identity, whatever x holds there: torch.where(mask, x, identity).

    By bits, (x ^ ((x ^ identity) & all ones where masked)), because torch.where takes three times as long on a CPU, longer than the scan.
    """
    bits_T = x_T.view(torch.int32)
    identity_bits = int(torch.tensor(identity, dtype=torch.float32).view(torch.int32))
    masked_T = mask_T.to(torch.int32).sub_(1)  # 0 where True, -1 (all ones) where False
    return (bits_T ^ identity_bits).bitwise_and_(masked_T).bitwise_xor_(bits_T).view(torch.float32)


def _running_min(shard: SequenceShard, x_T: Tensor) -> Tensor:
    """Inclusive running minimum inside each local chunk, fp32 [T]. Exact; linear in tokens, however many and uneven the chunks are.

    Tokens are folded into rows of _ROW, all of which run at once; then each row takes what its chunk brings along from the rows before.
    Almost all rows lie inside one chunk. Only those where a chunk starts in mid-row need the slower minimum that can restart.
    """
    num_rows = -(-len(x_T) // _ROW)
    x_RL = torch.nn.functional.pad(x_T, (0, num_rows * _ROW - len(x_T)), value=_INF).view(num_rows, _ROW)
    running_RL = x_RL.cummin(1).values

    starts = _chunk_starts(shard)
    mixed = (starts[starts % _ROW != 0] // _ROW).unique_consecutive().to(x_T.device)  # of M rows
    slot_ML = (mixed[:, None] * _ROW + torch.arange(_ROW, device=x_T.device)).clamp(max=len(x_T) - 1)
    chunk_ML = shard.chunk_id_T[slot_ML]
    mixed_ML = _restarting_min(x_RL[mixed].view(-1), chunk_ML.view(-1)).view(-1, _ROW)
    running_RL[mixed] = mixed_ML

    first_chunk_R = shard.chunk_id_T[::_ROW]
    last_chunk_R = torch.cat([shard.chunk_id_T[_ROW - 1 :: _ROW], shard.chunk_id_T[-1:]])[:num_rows]
    through_R = _restarting_min(running_RL[:, -1], last_chunk_R)
    brought_R = torch.where(first_chunk_R == last_chunk_R.roll(1), through_R.roll(1), _INF)
    brought_R[0] = _INF
    running_RL = torch.minimum(running_RL, brought_R[:, None])
    running_RL[mixed] = torch.minimum(mixed_ML, torch.where(chunk_ML == first_chunk_R[mixed][:, None], brought_R[mixed][:, None], _INF))
    return running_RL.view(-1)[: len(x_T)]


def _chunk_starts(shard: SequenceShard) -> Tensor:
    """First local token of every local chunk, on the host: reading `shard.chunk_starts` would wait for the device."""
    lengths = torch.tensor(shard.padded_lengths) // shard.num_chunks
    return lengths.repeat_interleave(len(shard.chunk_indices)).cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0)


def _restarting_min(x: Tensor, group: Tensor) -> Tensor:
    """Inclusive running minimum of fp32 numbers that restarts where the ascending group number changes. Exact.

    A key holds the group, negated, in its upper and x in its lower 32 bits, mapped so that integers order as floats do. Every key of a
    later group is below all keys of earlier ones, so one running minimum over all keys restarts by itself.
    """
    shifted = group << 32
    keys = _float_order(x.contiguous().view(torch.int32)).long() - shifted
    return _float_order((keys.cummin(0).values + shifted).int()).view(torch.float32)


def _float_order(bits: Tensor) -> Tensor:
    """fp32 bit patterns <-> int32 in the same order as the floats (its own inverse)."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _running_sum(shard: SequenceShard, x_T: Tensor) -> Tensor:
    """Inclusive running sum inside each local chunk, float64 [T].

    One running sum over everything, minus its value before the chunk. In float64 this costs at most 2**-52 of the sum of all |x| of
    the rank, which for log ratios lies far below fp32; in fp32 it would lose the digits of every later sequence.
    """
    running_T = x_T.double().cumsum(0)
    before = torch.cat([running_T.new_zeros(1), running_T[shard.chunk_starts[1:-1] - 1]])
    return running_T - before.index_select(0, shard.chunk_id_T)


def _chunk_reduce(shard: SequenceShard, x_T: Tensor, reduce: str) -> Tensor:
    """Sum or maximum of every local chunk, float64 [N * S], each chunk by itself."""
    return torch.segment_reduce(x_T.double(), reduce, offsets=shard.chunk_starts)
