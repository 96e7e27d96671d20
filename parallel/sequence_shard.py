"""Which tokens of which sequence this rank holds: packed sequences, optionally cut in zigzag over context-parallel ranks.

Packed means that sequences lie one behind the other on one token axis, each padded at its end. Zigzag means that a sequence is
cut into 2 * cp chunks of equal length and rank r holds chunks r and 2 * cp - 1 - r, in this order, which gives every rank the same amount
of causal attention. It is applied inside each sequence, as Megatron-Core's rotary embedding and TransformerEngine's attention expect
for the THD layout.

Shapes: T local packed tokens (padding included), S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int32, Int64, Shaped
from torch import Tensor

from parallel.token_rows import TokenRows, fold_tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceShard:
    """The local part of S packed sequences. Build it with `whole` or `zigzag`.

    A *chunk* is a run of consecutive positions of one sequence: the whole padded sequence, or one of its 2 * cp parts. Local tokens are
    ordered by sequence, then by chunk; `chunk_starts` holds the first local token of every local chunk in this order, then T.
    """

    lengths: tuple[int, ...]  # true lengths, [S]
    padded_lengths: tuple[int, ...]  # [S]
    cp_rank: int
    cp_size: int
    group: dist.ProcessGroup | None  # the context-parallel group; None only where nothing is exchanged
    chunk_indices: tuple[int, ...]  # which chunks of every sequence are here: (0,) or (cp_rank, 2 * cp_size - 1 - cp_rank)
    sequence_id_T: Int64[Tensor, " T"]
    position_T: Int64[Tensor, " T"]  # position inside its sequence; padding runs on past the true length
    padding_T: Bool[Tensor, " T"]
    cu_seqlens: Int32[Tensor, " _"]  # [S + 1] offsets of the padded, un-sharded sequences: Megatron's PackedSeqParams
    chunk_id_T: Int64[Tensor, " T"]  # sequence * len(chunk_indices) + number of the local chunk
    chunk_starts: Int64[Tensor, " _"]  # [S * len(chunk_indices) + 1]

    @classmethod
    def whole(cls, lengths: Sequence[int], *, multiple_of: int = 1, device: torch.device | str | None = None) -> SequenceShard:
        """One rank holds every token of every sequence, each padded to a multiple of `multiple_of`.

        Raises ValueError for no sequence at all, and for a length or a multiple below 1.
        """
        return _build(lengths, 0, 1, None, multiple_of=multiple_of, device=device)

    @classmethod
    def zigzag(
        cls,
        lengths: Sequence[int],
        cp_rank: int,
        cp_size: int,
        group: dist.ProcessGroup | None,
        *,
        multiple_of: int = 1,
        device: torch.device | str | None = None,
    ) -> SequenceShard:
        """Rank `cp_rank` of `cp_size` holds two chunks of every sequence; cp_size = 1 is `whole`.

        Each sequence is padded to the least common multiple of `multiple_of` and 2 * cp_size. Under sequence parallelism the local token
        count must divide by tp, so pass multiple_of = 2 * cp_size * tp. All ranks must pass the same lengths.
        group: its rank order is the context-parallel order. None is for code that exchanges nothing (a planner, a test).
        Raises ValueError as `whole`, and when rank or size disagree with each other or with the group.
        """
        if group is not None and (dist.get_rank(group), dist.get_world_size(group)) != (cp_rank, cp_size):
            raise ValueError(
                f"cp_rank={cp_rank}, cp_size={cp_size} disagree with the group, where this process is rank {dist.get_rank(group)} "
                f"of {dist.get_world_size(group)}"
            )
        return _build(lengths, cp_rank, cp_size, group, multiple_of=multiple_of, device=device)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_local_tokens(self) -> int:
        return len(self.position_T)

    @property
    def num_chunks(self) -> int:
        """Chunks of one sequence over all ranks: 1, or 2 * cp_size."""
        return len(self.chunk_indices) * self.cp_size

    @property
    def max_seqlen(self) -> int:
        """Longest padded, un-sharded sequence: Megatron's PackedSeqParams."""
        return max(self.padded_lengths)

    @property
    def device(self) -> torch.device:
        return self.position_T.device

    @cached_property
    def rows(self) -> TokenRows:
        """Local tokens folded into rows, for scans. Made at the first use and kept."""
        chunk_lengths = torch.tensor(self.padded_lengths, dtype=torch.int64) // self.num_chunks
        return fold_tokens(chunk_lengths.repeat_interleave(len(self.chunk_indices)), self.device)

    def to(self, device: torch.device | str) -> SequenceShard:
        """The same shard with its tensors on `device`. Waits for no device."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        return replace(self, **moved)

    def local(self, per_sequence: Sequence[Tensor], fill: float | int | bool) -> Shaped[Tensor, " T"]:
        """Cut one [length_i] tensor per sequence and join this rank's parts: -> [T], padding holds `fill`, dtype kept.

        Differentiable. Raises ValueError naming the first sequence whose tensor has another shape than [length_i].
        """
        if len(per_sequence) != self.num_sequences:
            raise ValueError(f"expected {self.num_sequences} tensors, one per sequence, got {len(per_sequence)}")
        for i, (x, length) in enumerate(zip(per_sequence, self.lengths, strict=True)):
            if tuple(x.shape) != (length,):
                raise ValueError(f"sequence {i}: expected shape ({length},), got {tuple(x.shape)}")
        joined = torch.cat([x.to(self.device) for x in per_sequence])
        starts_S = _offsets(self.lengths, device=self.device)[:-1]
        source_T = (starts_S[self.sequence_id_T] + self.position_T).masked_fill(self.padding_T, 0)
        return joined[source_T].masked_fill(self.padding_T, fill)

    def per_token(self, x_S: Shaped[Tensor, " S"]) -> Shaped[Tensor, " T"]:
        """Give every local token the value of its sequence: [S] -> [T]."""
        return x_S[self.sequence_id_T]

    def assemble(self, x_T: Shaped[Tensor, " T"]) -> list[Tensor]:
        """Inverse of `local`: [T] on every rank -> S tensors of the true lengths, on every rank, without gradient.

        One all-gather over the group when cp_size > 1, none otherwise. Raises ValueError for a wrong shape, or for a missing group.
        """
        if tuple(x_T.shape) != (self.num_local_tokens,):
            raise ValueError(f"expected shape ({self.num_local_tokens},), got {tuple(x_T.shape)}")
        x_T = x_T.detach().contiguous()
        if self.cp_size == 1:
            return self._cut(x_T)
        gathered = x_T.new_empty(self.cp_size * self.num_local_tokens)
        dist.all_gather_into_tensor(gathered, x_T, group=self.require_group())
        return self.join(list(gathered.chunk(self.cp_size)))

    def join(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The pure part of `assemble`: every rank's [T], in rank order -> S tensors of the true lengths."""
        padded = torch.empty(sum(self.padded_lengths), dtype=parts[0].dtype, device=self.device)
        for rank, part_T in enumerate(parts):
            place_T = _placement(self.padded_lengths, rank, self.cp_size, self.device)
            padded[self.cu_seqlens[:-1].long()[place_T.sequence_id] + place_T.position] = part_T
        return self._cut(padded)

    def require_group(self) -> dist.ProcessGroup:
        """The group to exchange over. Raises ValueError where the shard was cut without one."""
        if self.group is None:
            raise ValueError(f"this shard is cut over cp_size={self.cp_size} ranks but has no process group to exchange over")
        return self.group

    def _cut(self, padded: Tensor) -> list[Tensor]:
        return [x[:length] for x, length in zip(padded.split(self.padded_lengths), self.lengths, strict=True)]


@dataclass(frozen=True)
class _Placement:
    sequence_id: Tensor
    position: Tensor
    chunk_id: Tensor
    chunk_starts: Tensor


def _chunk_indices(cp_rank: int, cp_size: int) -> tuple[int, ...]:
    return (0,) if cp_size == 1 else (cp_rank, 2 * cp_size - 1 - cp_rank)


def _offsets(lengths: Sequence[int], *, device: torch.device | str | None) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(device, non_blocking=True)


def _placement(padded_lengths: tuple[int, ...], cp_rank: int, cp_size: int, device: torch.device | str | None) -> _Placement:
    """Sequence, position and chunk of every token that `cp_rank` holds."""
    held = torch.tensor(_chunk_indices(cp_rank, cp_size), dtype=torch.int64)
    chunk_length_S = torch.tensor(padded_lengths, dtype=torch.int64) // (len(held) * cp_size)
    first_position = (held * chunk_length_S[:, None]).flatten()  # of every local chunk
    chunk_lengths = chunk_length_S.repeat_interleave(len(held))
    chunk_starts = torch.cat([chunk_lengths.new_zeros(1), chunk_lengths.cumsum(0)])
    chunk_id_T = torch.arange(len(chunk_lengths)).repeat_interleave(chunk_lengths)
    position_T = torch.arange(len(chunk_id_T)) + (first_position - chunk_starts[:-1])[chunk_id_T]
    return _Placement(
        sequence_id=(chunk_id_T // len(held)).to(device, non_blocking=True),
        position=position_T.to(device, non_blocking=True),
        chunk_id=chunk_id_T.to(device, non_blocking=True),
        chunk_starts=chunk_starts.to(device, non_blocking=True),
    )


def _build(
    lengths: Sequence[int],
    cp_rank: int,
    cp_size: int,
    group: dist.ProcessGroup | None,
    *,
    multiple_of: int,
    device: torch.device | str | None,
) -> SequenceShard:
    lengths = tuple(int(length) for length in lengths)
    if not lengths:
        raise ValueError("lengths is empty; a shard needs at least one sequence")
    for i, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{i}] is {length}; every sequence needs at least one token")
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}; expected at least 1")
    if not 0 <= cp_rank < cp_size:
        raise ValueError(f"cp_rank={cp_rank} is not a rank of cp_size={cp_size}")

    unit = multiple_of if cp_size == 1 else math.lcm(multiple_of, 2 * cp_size)
    padded_lengths = tuple(-(-length // unit) * unit for length in lengths)
    place = _placement(padded_lengths, cp_rank, cp_size, device)
    lengths_S = torch.tensor(lengths, dtype=torch.int64, device=place.position.device)
    return SequenceShard(
        lengths=lengths,
        padded_lengths=padded_lengths,
        cp_rank=cp_rank,
        cp_size=cp_size,
        group=group,
        chunk_indices=_chunk_indices(cp_rank, cp_size),
        sequence_id_T=place.sequence_id,
        position_T=place.position,
        padding_T=place.position >= lengths_S[place.sequence_id],
        cu_seqlens=_offsets(padded_lengths, device=device).int(),
        chunk_id_T=place.chunk_id,
        chunk_starts=place.chunk_starts,
    )
