"""Which parameters a rank holds, who sends which to rank 0, and how much at once, for models and layouts small enough to list."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import Parameter, hf_shapes, parameters
from parallel.layout import ParallelLayout
from parallel.weights import _buckets, _owners, load_weights, local_parameters, mark_tensor_parallel

MOE = Architecture(
    model_type="qwen3_moe",
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    norm_topk_prob=True,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    dtype=None,
)
TABLE = {parameter.megatron_name: parameter for parameter in parameters(MOE)}


class Chunk(torch.nn.Module):
    """What local_parameters sees of a model chunk: decoder.layers with layer_number, experts numbered from 0 on every rank."""

    def __init__(self, layer_numbers: list[int], num_local_experts: int, *, head: bool = False) -> None:
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList()
        for number in layer_numbers:
            layer = torch.nn.Module()
            layer.layer_number = number
            layer.mlp = torch.nn.Module()
            layer.mlp.experts = torch.nn.Module()
            layer.mlp.experts.local_experts = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(num_local_experts))
            self.decoder.layers.append(layer)
        if head:
            self.output_layer = torch.nn.Linear(1, 1, bias=False)


def groups_of(layout: ParallelLayout, rank: int) -> SimpleNamespace:
    return SimpleNamespace(coordinates=layout.coordinates(rank))


def test_local_names_are_global_over_virtual_stages_and_expert_ranks() -> None:
    layout = ParallelLayout(world_size=4, pp=2, vpp=2, ep=2)
    # Rank 3: second stage (layers 2 and 4, counted from 1), second half of the experts.
    chunks = [Chunk([2], 2), Chunk([4], 2, head=True)]
    local = local_parameters(chunks, MOE, layout, groups_of(layout, 3))  # type: ignore[arg-type]
    assert list(local) == [
        "decoder.layers.1.mlp.experts.local_experts.2.weight",
        "decoder.layers.1.mlp.experts.local_experts.3.weight",
        "decoder.layers.3.mlp.experts.local_experts.2.weight",
        "decoder.layers.3.mlp.experts.local_experts.3.weight",
        "output_layer.weight",
    ]
    assert local["decoder.layers.3.mlp.experts.local_experts.2.weight"] is chunks[1].decoder.layers[0].mlp.experts.local_experts[0].weight


# -- marks --------------------------------------------------------------------------------------------------------------


def test_exactly_the_shards_are_marked_tensor_parallel() -> None:
    local = {name: torch.nn.Parameter(torch.zeros(1)) for name in TABLE}
    mark_tensor_parallel(local, MOE)
    marked = {name: parameter.partition_dim for name, parameter in local.items() if getattr(parameter, "tensor_model_parallel", False)}
    # Written down from Megatron's layers: ColumnParallelLinear cuts dim 0, RowParallelLinear dim 1, norms and router are whole.
    cut = {"linear_qkv": 0, "linear_fc1": 0, "word_embeddings": 0, "output_layer": 0, "linear_proj": 1, "linear_fc2": 1}
    expected = {name: dim for name in TABLE for kind, dim in cut.items() if f"{kind}." in name}
    assert marked == expected
    assert any("norm" in name for name in TABLE.keys() - marked.keys())
    assert any("router" in name for name in TABLE.keys() - marked.keys())


def test_a_tied_head_on_a_stage_of_its_own_is_marked_too() -> None:
    tied = dataclasses.replace(MOE, tie_word_embeddings=True)
    local = {"output_layer.weight": torch.nn.Parameter(torch.zeros(1))}
    mark_tensor_parallel(local, tied)
    assert (local["output_layer.weight"].tensor_model_parallel, local["output_layer.weight"].partition_dim) == (True, 0)


# -- loading ------------------------------------------------------------------------------------------------------------


def full_weights(architecture: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(architecture).items()}


def test_a_rank_reads_only_what_it_holds_and_takes_its_own_part() -> None:
    layout = ParallelLayout(world_size=2, tp=2, sequence_parallel=True)
    weights = full_weights(MOE)
    asked: list[str] = []

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return weights[name]

    proj, head = "decoder.layers.2.self_attention.linear_proj.weight", "output_layer.weight"
    local = {proj: torch.nn.Parameter(torch.empty(8, 4)), head: torch.nn.Parameter(torch.empty(6, 8))}
    load_weights(local, MOE, layout, groups_of(layout, 1), read)  # type: ignore[arg-type]
    assert asked == ["model.layers.2.self_attn.o_proj.weight", "lm_head.weight"]
    assert torch.equal(local[proj], weights["model.layers.2.self_attn.o_proj.weight"][:, 4:])
    assert torch.equal(local[head], weights["lm_head.weight"][6:])


def test_experts_are_cut_by_the_expert_tensor_axis() -> None:
    layout = ParallelLayout(world_size=2, etp=2)
    weights = full_weights(MOE)
    name = "decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight"
    local = {name: torch.nn.Parameter(torch.empty(8, 3))}
    load_weights(local, MOE, layout, groups_of(layout, 1), weights.__getitem__)  # type: ignore[arg-type]
    assert torch.equal(local[name], weights["model.layers.0.mlp.experts.3.down_proj.weight"][:, 3:])


def test_a_tied_head_is_filled_from_the_embedding() -> None:
    tied = dataclasses.replace(MOE, tie_word_embeddings=True)
    layout = ParallelLayout(world_size=2, pp=2)
    weights = full_weights(tied)
    local = {"output_layer.weight": torch.nn.Parameter(torch.empty(12, 8))}
    load_weights(local, tied, layout, groups_of(layout, 1), weights.__getitem__)  # type: ignore[arg-type]
    assert torch.equal(local["output_layer.weight"], weights["model.embed_tokens.weight"])


def test_a_parameter_that_no_row_fills_is_named() -> None:
    layout = ParallelLayout(world_size=1)
    local = {"decoder.layers.0.mlp.gate_bias": torch.nn.Parameter(torch.empty(1))}
    with pytest.raises(ValueError, match=r"no row of the mapping table fills: \['decoder\.layers\.0\.mlp\.gate_bias'\]"):
        load_weights(local, MOE, layout, groups_of(layout, 0), full_weights(MOE).__getitem__)  # type: ignore[arg-type]


# -- exporting ----------------------------------------------------------------------------------------------------------


def names_held(layout: ParallelLayout, rank: int) -> list[str]:
    """Every stage holds a run of layers, the first one the embedding, the last one the rest."""
    place = layout.coordinates(rank)
    assert MOE.num_experts is not None
    held = []
    for name, parameter in TABLE.items():
        if parameter.layer is None:
            stage = 0 if name.startswith("embedding.") else layout.pp - 1
        else:
            stage = parameter.layer * layout.pp // MOE.num_hidden_layers
        expert = int(name.split("local_experts.")[1].split(".")[0]) if parameter.is_expert else None
        if stage == place.pp and (expert is None or expert * layout.ep // MOE.num_experts == place.ep):
            held.append(name)
    return held


LAYOUTS = [
    ParallelLayout(world_size=1),
    ParallelLayout(world_size=4, ep=4),
    ParallelLayout(world_size=4, tp=2, pp=2, sequence_parallel=True),
    ParallelLayout(world_size=8, tp=2, pp=2, ep=2, etp=2, sequence_parallel=True),
    ParallelLayout(world_size=8, tp=2, cp=2, ep=2, sequence_parallel=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_parameter_has_one_owner_that_is_first_in_its_group(layout: ParallelLayout) -> None:
    held = [names_held(layout, rank) for rank in range(layout.world_size)]
    owner = _owners(held, layout)
    assert owner.keys() == TABLE.keys()
    for name, rank in owner.items():
        assert name in held[rank]
        place = layout.coordinates(rank)
        assert (place.etp if TABLE[name].is_expert else place.tp) == 0
        holders = [other for other in range(layout.world_size) if name in held[other]]
        assert rank == min(holders), "the first holder is first on every axis"


@settings(max_examples=60, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), bucket_bytes=st.integers(1, 5000), element_size=st.sampled_from([2, 4]))
def test_buckets_hold_every_parameter_once_by_one_owner_within_the_size(
    layout: ParallelLayout, bucket_bytes: int, element_size: int
) -> None:
    owner = _owners([names_held(layout, rank) for rank in range(layout.world_size)], layout)
    buckets = _buckets(MOE, owner, element_size, bucket_bytes)
    assert sorted(parameter.megatron_name for _, bucket in buckets for parameter in bucket) == sorted(TABLE)

    def num_bytes(parameter: Parameter) -> int:
        return element_size * torch.Size(parameter.megatron_shape).numel()

    for rank, bucket in buckets:
        assert {owner[parameter.megatron_name] for parameter in bucket} == {rank}
        assert len(bucket) == 1 or sum(map(num_bytes, bucket)) <= bucket_bytes
    for (rank, bucket), (next_rank, following) in pairwise(buckets):
        # Nothing that fits is left to the next bucket.
        assert rank != next_rank or sum(map(num_bytes, bucket)) + num_bytes(following[0]) > bucket_bytes
    # Layer by layer, so that a server can load what has arrived; the embedding first, the head last.
    layers = [parameter.layer for _, bucket in buckets for parameter in bucket]
    inner = [layer for layer in layers if layer is not None]
    assert inner == sorted(inner)
    assert layers[0] is None and layers[-1] is None


def test_experts_of_many_ranks_do_not_break_buckets_up() -> None:
    layout = ParallelLayout(world_size=4, ep=4)
    owner = _owners([names_held(layout, rank) for rank in range(4)], layout)
    # One bucket for what rank 0 has before its experts, then per layer one from each of ranks 1 to 3.
    assert [rank for rank, _ in _buckets(MOE, owner, 4, 1 << 30)] == [0, 1, 2, 3] * 4 + [0]
