"""Hugging Face tensors into this rank's shards and back out, streamed, through the one mapping table.

The whole model is never on one rank: loading reads a parameter, keeps this rank's part and drops the rest; exporting moves
one bucket of parameters at a time to rank 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_convert.mapping import Architecture, Parameter, Split, parameters
from parallel.layout import ParallelLayout
from parallel.mcore import set_tensor_model_parallel_attributes
from parallel.model import HiddenStateModel
from parallel.process_groups import ProcessGroups

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def canonical_name(name: str) -> str:
    """The mapping table's name of a parameter, whichever layer spec made it.

    TransformerEngine's spec keeps a norm with the linear layer behind it, and a rank's experts in one grouped layer: weight0, weight1, ...
    """
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(fused, own)
    return _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\2.\1.weight", name)


def local_parameters(
    chunks: Sequence[HiddenStateModel], architecture: Architecture, layout: ParallelLayout, groups: ProcessGroups
) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name: layers counted over all stages, experts over all expert-parallel ranks."""
    first_expert = 0
    if architecture.num_experts is not None:
        first_expert = groups.coordinates.ep * (architecture.num_experts // layout.ep)
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            layer = _LAYER.match(name)
            if layer is not None:
                number = chunk.decoder.layers[int(layer[1])].layer_number - 1
                name = f"decoder.layers.{number}.{name[layer.end() :]}"
            name = canonical_name(name)
            name = _EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + first_expert}.", name)
            found[name] = parameter
    return found


def mark_tensor_parallel(local: dict[str, torch.nn.Parameter], architecture: Architecture) -> None:
    """Tell Megatron which parameters are shards, as its own random initialisation would. Call before the optimizer is built.

    Without the marks the gradient norm leaves out every rank but the first of a tensor-parallel group, and clipping is wrong.
    """
    splits = {parameter.megatron_name: parameter.split for parameter in parameters(architecture)}
    splits.setdefault("output_layer.weight", Split.ROWS)  # a tied head on a stage of its own
    for name, parameter in local.items():
        split = splits[name]
        if split is not Split.REPLICATED and not hasattr(parameter, "tensor_model_parallel"):  # 0.17 and later mark by themselves
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=1 if split is Split.COLUMNS else 0, stride=1)


def load_weights(
    local: dict[str, torch.nn.Parameter],
    architecture: Architecture,
    layout: ParallelLayout,
    groups: ProcessGroups,
    read: Callable[[str], Tensor],
) -> None:
    """Fill this rank's parameters. read(name) returns one full Hugging Face tensor; it is asked only for what this rank holds.

    Raises ValueError when a local parameter is in no row of the mapping table, or a tensor has another shape.
    """
    waiting = dict(local)
    with torch.no_grad():
        for parameter in parameters(architecture):
            target = waiting.pop(parameter.megatron_name, None)
            if target is None and architecture.tie_word_embeddings and parameter.megatron_name == "embedding.word_embeddings.weight":
                # Under pipeline parallelism a tied embedding lives a second time on the last stage, as its output layer.
                target = waiting.pop("output_layer.weight", None)
            if target is None:
                continue
            full = parameter.from_hf([read(name) for name in parameter.hf_names])
            target.copy_(_shard(parameter, full, layout, groups))
    if waiting:
        raise ValueError(f"parameters that no row of the mapping table fills: {sorted(waiting)}")


def _shard(parameter: Parameter, full: Tensor, layout: ParallelLayout, groups: ProcessGroups) -> Tensor:
    if parameter.is_expert:
        return parameter.shard(full, groups.coordinates.etp, layout.etp)
    return parameter.shard(full, groups.coordinates.tp, layout.tp)


class WeightExporter:
    """Streams Hugging Face tensors to rank 0. Every rank must iterate; ranks other than 0 yield nothing.

    bucket_bytes: how much travels at once from an owner to rank 0 (at least one parameter).
    """

    def __init__(
        self,
        local: dict[str, torch.nn.Parameter],
        architecture: Architecture,
        layout: ParallelLayout,
        groups: ProcessGroups,
        *,
        bucket_bytes: int = 256 << 20,
    ) -> None:
        self._local = local
        self._layout = layout
        self._groups = groups
        names_of_rank: list[list[str]] = [[] for _ in range(layout.world_size)]
        dist.all_gather_object(names_of_rank, list(local), group=groups.control)
        # The communicator of all ranks, which `_exchange` uses between two of them, is made by a collective of all.
        dist.all_reduce(torch.zeros(1, device=next(iter(local.values())).device))
        owner = _owners(names_of_rank, layout)
        self._buckets = _buckets(architecture, owner, next(iter(local.values())).element_size(), bucket_bytes)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        rank = dist.get_rank()
        for owner, bucket in self._buckets:
            full = [self._gather(parameter, owner) for parameter in bucket]
            if rank == owner and rank != 0:
                _exchange(dist.isend, torch.cat([tensor.reshape(-1) for tensor in full]), peer=0)
            if rank != 0:
                continue
            if owner != 0:
                full = self._receive(bucket, owner)
            for parameter, tensor in zip(bucket, full, strict=True):
                yield from zip(parameter.hf_names, parameter.to_hf(tensor), strict=True)

    def _gather(self, parameter: Parameter, owner: int) -> Tensor:
        """The full parameter on the ranks of the owner's tensor-parallel group; an empty tensor elsewhere."""
        group = self._groups.etp if parameter.is_expert else self._groups.tp
        if owner not in dist.get_process_group_ranks(group):
            return torch.empty(0)
        mine = self._local[parameter.megatron_name].detach()
        if group.size() == 1:
            return mine
        shards = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(shards, mine.contiguous(), group=group)
        return parameter.unshard(shards)

    def _receive(self, bucket: Sequence[Parameter], owner: int) -> list[Tensor]:
        like = next(iter(self._local.values()))
        sizes = [torch.Size(parameter.megatron_shape).numel() for parameter in bucket]
        flat = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        _exchange(dist.irecv, flat, peer=owner)
        return [part.view(parameter.megatron_shape) for part, parameter in zip(flat.split(sizes), bucket, strict=True)]


def _exchange(operation: Callable[..., Any], tensor: Tensor, *, peer: int) -> None:
    """Send or receive over the communicator of all ranks. NCCL would make one of two ranks for a single `send` and its `recv`."""
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()


def take_part(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """What every rank but 0 does with `export_weights`: send its share, receive nothing."""
    for name, _ in tensors:
        raise AssertionError(f"only rank 0 receives exported weights, this one got {name}")


def _owners(names_of_rank: Sequence[Sequence[str]], layout: ParallelLayout) -> dict[str, int]:
    """The lowest rank that holds each parameter and is first in its tensor-parallel group."""
    owner: dict[str, int] = {}
    for rank, names in enumerate(names_of_rank):
        place = layout.coordinates(rank)
        for name in names:
            first = place.etp == 0 if ".local_experts." in name else place.tp == 0
            if first:
                owner.setdefault(name, rank)
    return owner


def _buckets(architecture: Architecture, owner: dict[str, int], element_size: int, bucket_bytes: int) -> list[tuple[int, list[Parameter]]]:
    """Runs of parameters of one owner, in the table's order, each of at most bucket_bytes (or one parameter).

    Experts of one layer are dealt out by owner, so that their order on several ranks does not break buckets up.
    """
    buckets: list[tuple[int, list[Parameter]]] = []
    filled = 0
    ordered = sorted(
        enumerate(parameters(architecture)),
        key=lambda item: (
            item[1].layer if item[1].layer is not None else _edge(item[0]),
            item[1].is_expert,
            owner[item[1].megatron_name],
            item[0],
        ),
    )
    for _, parameter in ordered:
        rank = owner[parameter.megatron_name]
        size = torch.Size(parameter.megatron_shape).numel() * element_size
        if not buckets or buckets[-1][0] != rank or filled + size > bucket_bytes:
            buckets.append((rank, []))
            filled = 0
        buckets[-1][1].append(parameter)
        filled += size
    return buckets


def _edge(index: int) -> float:
    """The embedding comes before all layers, the final norm and the head after them."""
    return -1.0 if index == 0 else float("inf")
