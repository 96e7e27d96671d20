"""Routing replay: in one pass over a mini-batch, the routers visit the experts of given rows, or their own choice is recorded.

The rows of a micro-batch hang on its packed record, which Megatron-Core hands to every layer, also when a layer is recomputed in backward.
The router looks its rows up there by its layer number. So there is no global state, no order of routers and no list of pending backward
passes: any schedule, with any number of micro-batches in flight, replays the right rows. Megatron-Core's own RouterReplay has all three.

Only the set of experts is replayed. Logits, gate probabilities, gradients and the statistics of the balance loss are those of the router
as it is now.
"""

# Shapes: T this rank's tokens at the router (its part of them under sequence parallelism), N layers of this rank, K experts per token.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_convert.mapping import Architecture
from parallel.expert_rows import is_missing, is_wrong, missing_id, row_dtype
from parallel.sequence_shard import SequenceShard


def check_replay(options: Mapping[str, Any], architecture: Architecture) -> None:
    """Raises ValueError where rows could not be replayed, or not in every pass.

    Args:
        options: `megatron:` of the configuration.
        architecture: the model.
    """
    if not architecture.is_moe:
        raise ValueError("the model has no experts; expected none")
    if options.get("moe_router_fusion"):
        raise ValueError("megatron.moe_router_fusion = True: the fused router chooses experts by itself; remove one of the two")
    if options.get("moe_layer_recompute") or "moe" in (options.get("recompute_modules") or ()):
        # It would be recomputed by itself, at a time when its layer may have gone on to another micro-batch.
        raise ValueError("megatron.recompute_modules holds 'moe', which cannot be recomputed with given experts; remove one of the two")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """(token, layer) pairs of one pass, over all ranks."""

    replayed: int  # had a row; recorded ones, in a pass that records
    missing: int  # had none: the router chose
    differing: int  # of those with a row: the router's own set is another one


class RowSink(Protocol):
    """Takes the rows that a pass records. Ranks record disjoint rows."""

    def write(self, index: int, layer: int, position: int, rows: Tensor) -> None:
        """
        Args:
            index: of the sequence in the mini-batch.
            layer: from 0.
            position: of the first row inside the sequence.
            rows: [positions, k] on the CPU, of `row_dtype`.
        """
        ...


class Run(NamedTuple):
    """Consecutive positions of one sequence that lie side by side on this rank."""

    number: int  # of the sequence in the micro-batch
    position: int  # of the first one in the sequence
    start: int  # of the first one among the rank's tokens
    size: int


def local_runs(shard: SequenceShard, *, part: int, parts: int) -> list[Run]:
    """Where the true positions (no padding) of the shard's sequences lie in one of `parts` equal parts of its local tokens."""
    low, high = (shard.num_local_tokens // parts * end for end in (part, part + 1))
    runs, start = [], 0
    for number, (length, padded) in enumerate(zip(shard.lengths, shard.padded_lengths, strict=True)):
        chunk = padded // shard.num_chunks
        for index in shard.chunk_indices:
            first = max(start, low)
            position = index * chunk + first - start
            size = min(start + chunk, high, start + length - index * chunk) - first
            if size > 0:
                runs.append(Run(number, position, first - low, size))
            start += chunk
    return runs


class RoutingPass:
    """What the routers of this rank replay or record in one pass, and what they met."""

    def __init__(
        self,
        *,
        num_experts: int,
        layers: Sequence[int],
        tp_part: tuple[int, int],
        device: torch.device,
        sink: RowSink | None = None,
    ) -> None:
        """
        Args:
            num_experts: of the model, per layer.
            layers: of this rank, from 0, ascending.
            tp_part: under sequence parallelism this rank's number and size of the tensor-parallel group, else (0, 1).
            device: of the model.
            sink: record the routers' own choice instead of replaying.
        """
        self.num_experts = num_experts
        self.layers = tuple(layers)
        self.tp_part = tp_part
        self.device = device
        self.sink = sink
        self.tallies: dict[tuple[int, int], Tensor] = {}  # by micro-batch and layer: a recomputed layer counts once
        self._copies: list[_Copy] = []
        self._micro_batches = 0
        self._expected = 0  # rows that this rank's routers are to be asked for

    def micro_batch(self, indices: Sequence[int], experts: Sequence[Tensor | None], shard: SequenceShard) -> MicroBatchRouting:
        """The part of one micro-batch.

        Args:
            indices: of its sequences in the mini-batch.
            experts: of each of them: rows [layers, L - 1, k], or None. A sequence of padding that follows has none.
            shard: what this rank holds of them, on the host.
        """
        part, parts = self.tp_part
        runs = [run for run in local_runs(shard, part=part, parts=parts) if run.number < len(indices)]
        self._micro_batches += 1
        self._expected += len(self.layers) * sum(run.size for run in runs)
        return MicroBatchRouting(
            owner=self,
            number=self._micro_batches - 1,
            indices=tuple(indices),
            experts=tuple(experts),
            runs=runs,
            num_tokens=shard.num_local_tokens // parts,
        )

    def copy_out(self, copy: _Copy) -> None:
        """Write recorded rows as soon as the device has copied them; waits for none."""
        self._copies.append(copy)
        while self._copies and (self._copies[0].done is None or self._copies[0].done.query()):
            self._write(self._copies.pop(0))

    def finish(self) -> RoutingCounts:
        """Collective over all ranks, after the pass.

        Raises:
            ValueError: on every rank, when a row is not a set of different experts.
            RuntimeError: on every rank, when a router was not asked.
        """
        zero = torch.zeros(4, dtype=torch.int64, device=self.device)
        counts = torch.stack([zero, *self.tallies.values()]).sum(0)
        total = torch.cat([counts, (self._expected - counts[:2].sum(0, keepdim=True)).abs()])
        dist.all_reduce(total)
        replayed, missing, differing, wrong, unasked = total.tolist()  # waits for the device: all copies are complete
        for copy in self._copies:
            self._write(copy)
        self._copies.clear()
        if wrong:
            raise ValueError(
                f"experts: {wrong} of {replayed} rows of a token and layer do not hold different ids from 0 to {self.num_experts - 1}"
            )
        if unasked:
            raise RuntimeError(f"experts: {unasked} rows of a token and layer were not asked for by their routers")
        return RoutingCounts(replayed=replayed, missing=missing, differing=differing)

    def _write(self, copy: _Copy) -> None:
        assert self.sink is not None
        for run in copy.runs:
            self.sink.write(copy.indices[run.number], copy.layer, run.position, copy.ids[run.start : run.start + run.size])


@dataclass(kw_only=True)
class MicroBatchRouting:
    """What a micro-batch's packed record carries for the routers."""

    owner: RoutingPass
    number: int
    indices: tuple[int, ...]
    experts: tuple[Tensor | None, ...]
    runs: list[Run]
    num_tokens: int
    _rows: Tensor | None = field(default=None, repr=False)  # [N, T, K] on the device, from the first question on
    _real_T: Tensor | None = field(default=None, repr=False)

    @property
    def records(self) -> bool:
        return self.owner.sink is not None

    def choose(self, layer: int, own_TK: Tensor) -> Tensor:
        """The experts that this layer's tokens visit: the given rows, or the router's own choice where it is the same set or none is given.

        Args:
            layer: from 0.
            own_TK: int64, what the router chooses by itself.
        """
        rows_TK, real_T = self._load(experts_per_token=own_TK.size(1), layer=layer)
        missing_T = is_missing(rows_TK)
        ascending_TK = rows_TK.long().sort(-1).values
        wrong_T = is_wrong(ascending_TK, num_experts=self.owner.num_experts) & ~missing_T
        differing_T = (ascending_TK != own_TK.sort(-1).values).any(-1) & ~missing_T
        self._count(layer, real_T & ~missing_T, real_T & missing_T, real_T & differing_T, real_T & wrong_T)
        replayed_T1 = (differing_T & ~wrong_T)[:, None]
        return torch.where(replayed_T1, ascending_TK, own_TK)

    def record(self, layer: int, own_TK: Tensor) -> None:
        """Hand the router's own choice on to the pass's sink. layer: from 0."""
        ids_TK = own_TK.detach().to(row_dtype(self.owner.num_experts))
        real_T = self._real()
        nothing_T = torch.zeros_like(real_T)
        self._count(layer, real_T, nothing_T, nothing_T, nothing_T)
        done = None
        if ids_TK.is_cuda:
            host_TK = torch.empty(ids_TK.shape, dtype=ids_TK.dtype, pin_memory=True)
            host_TK.copy_(ids_TK, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        else:
            host_TK = ids_TK
        self.owner.copy_out(_Copy(layer=layer, ids=host_TK, done=done, indices=self.indices, runs=self.runs))

    def _count(self, layer: int, *masks_T: Tensor) -> None:
        self.owner.tallies[self.number, layer] = torch.stack(masks_T).sum(1)

    def _real(self) -> Tensor:
        if self._real_T is None:
            real_T = torch.zeros(self.num_tokens, dtype=torch.bool)
            for run in self.runs:
                real_T[run.start : run.start + run.size] = True
            self._real_T = real_T.to(self.owner.device, non_blocking=True)
        return self._real_T

    def _load(self, *, experts_per_token: int, layer: int) -> tuple[Tensor, Tensor]:
        """Rows [T, K] of one layer, and which tokens are no padding [T]. The first question reads the rows of all layers of the rank."""
        owner = self.owner
        if self._rows is None:
            dtype = row_dtype(owner.num_experts)
            rows = torch.full((len(owner.layers), self.num_tokens, experts_per_token), missing_id(dtype), dtype=dtype)
            for run in self.runs:
                experts = self.experts[run.number]
                if experts is not None:
                    part = experts[:, run.position : run.position + run.size]
                    rows[:, run.start : run.start + run.size] = part[list(owner.layers)]
            self._rows = rows.to(owner.device, non_blocking=True)
        return self._rows[owner.layers.index(layer)], self._real()


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """Recorded rows on their way to the host."""

    layer: int
    ids: Tensor  # [T, K] on the host
    done: torch.cuda.Event | None  # None: it is there
    indices: tuple[int, ...]
    runs: list[Run]
