from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints_convert.hf_config import Architecture, read_architecture
from checkpoints_convert.mapping import (
    Parameter,
    Split,
    check_hf_tensors,
    fuse_qkv,
    hf_shapes,
    parameters,
    torch_dist_key,
    unfuse_qkv,
)

MOE = Architecture(
    model_type="qwen3_moe", vocab_size=24, hidden_size=12, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    head_dim=2, intermediate_size=20, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True,
    rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=64, tie_word_embeddings=False, dtype=torch.bfloat16,
)  # fmt: skip
DENSE = replace(
    MOE, model_type="qwen3", num_experts=None, num_experts_per_tok=None, moe_intermediate_size=None, norm_topk_prob=None,
    tie_word_embeddings=True,
)  # fmt: skip


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def random_bits(shape: tuple[int, ...], seed: int) -> Tensor:
    """bfloat16 of arbitrary bit patterns: NaNs with payloads, infinities, subnormals and both zeros included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)


def by_name(architecture: Architecture) -> dict[str, Parameter]:
    return {parameter.megatron_name: parameter for parameter in parameters(architecture)}


def test_query_key_value_rows_interleave_by_group_as_worked_by_hand() -> None:
    # 4 query heads and 2 key-value heads of size 2: each group holds 2 query heads, then its key head, then its value head.
    query, key, value = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    fused = fuse_qkv(query[:, None], key[:, None], value[:, None], num_groups=2)
    assert fused.flatten().tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    assert [part.flatten().tolist() for part in unfuse_qkv(fused, num_groups=2, head_dim=2)] == [
        query.tolist(), key.tolist(), value.tolist(),
    ]  # fmt: skip


def test_a_tensor_parallel_shard_of_qkv_holds_whole_groups() -> None:
    qkv = by_name(MOE)["decoder.layers.1.self_attention.linear_qkv.weight"]
    query, key, value = (random_bits(shape, seed) for seed, shape in enumerate(qkv.hf_shapes))
    full = qkv.from_hf([query, key, value])
    for rank in range(2):
        alone = fuse_qkv(query.chunk(2)[rank], key.chunk(2)[rank], value.chunk(2)[rank], num_groups=2)
        assert bits(qkv.shard(full, rank, 2)) == bits(alone)


def test_gate_and_up_are_each_split_as_worked_by_hand() -> None:
    fc1 = by_name(replace(DENSE, intermediate_size=4, hidden_size=1))["decoder.layers.0.mlp.linear_fc1.weight"]
    full = fc1.from_hf([torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11], [12], [13]])])
    assert full.flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert [fc1.shard(full, rank, 2).flatten().tolist() for rank in range(2)] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_each_split_cuts_the_axis_it_names() -> None:
    named = by_name(MOE)
    assert named["embedding.word_embeddings.weight"].shard_shape(4) == (6, 12)
    assert named["output_layer.weight"].shard_shape(4) == (6, 12)
    assert named["decoder.layers.0.self_attention.linear_qkv.weight"].shard_shape(4) == (8, 12)
    assert named["decoder.layers.0.self_attention.linear_proj.weight"].shard_shape(4) == (12, 4)
    assert named["decoder.layers.0.mlp.router.weight"].shard_shape(4) == (3, 12)
    assert named["decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight"].shard_shape(4) == (4, 12)
    assert named["decoder.layers.0.mlp.experts.local_experts.2.linear_fc2.weight"].shard_shape(4) == (12, 2)
    columns = named["decoder.layers.0.self_attention.linear_proj.weight"]
    full = torch.arange(12 * 16).view(12, 16)
    assert columns.shard(full, 1, 4)[0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("architecture", [MOE, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_parameter_survives_both_round_trips_bit_for_bit(architecture: Architecture, size: int) -> None:
    for number, parameter in enumerate(parameters(architecture)):
        tensors = [random_bits(shape, 10 * number + part) for part, shape in enumerate(parameter.hf_shapes)]
        full = parameter.from_hf(tensors)
        assert tuple(full.shape) == parameter.megatron_shape
        shards = [parameter.shard(full, rank, size) for rank in range(size)]
        assert all(tuple(shard.shape) == parameter.shard_shape(size) for shard in shards)
        whole = parameter.unshard(shards)
        assert bits(whole) == bits(full)
        assert [bits(tensor) for tensor in parameter.to_hf(whole)] == [bits(tensor) for tensor in tensors]


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 6), queries=st.integers(1, 4), half_head=st.integers(1, 4), hidden=st.integers(1, 5), seed=st.integers(0, 99))
def test_qkv_equals_stepping_head_by_head(groups: int, queries: int, half_head: int, hidden: int, seed: int) -> None:
    head_dim = 2 * half_head
    query, key, value = (
        random_bits((heads * head_dim, hidden), seed + part) for part, heads in enumerate([groups * queries, groups, groups])
    )
    rows: list[list[int]] = []
    for group in range(groups):
        for head in range(group * queries, (group + 1) * queries):
            rows += [bits(query[head * head_dim + i]) for i in range(head_dim)]
        rows += [bits(key[group * head_dim + i]) for i in range(head_dim)]
        rows += [bits(value[group * head_dim + i]) for i in range(head_dim)]
    fused = fuse_qkv(query, key, value, num_groups=groups)
    assert [bits(row) for row in fused] == rows
    restored = unfuse_qkv(fused, num_groups=groups, head_dim=head_dim)
    assert [bits(tensor) for tensor in restored] == [bits(tensor) for tensor in (query, key, value)]


def test_names_are_those_of_a_local_spec_model_in_canonical_order() -> None:
    layer = [
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
    ]
    norms = ["input_layernorm.weight", "pre_mlp_layernorm.weight"]
    experts = [f"mlp.experts.local_experts.{e}.linear_fc{n}.weight" for e in range(3) for n in (1, 2)]
    dense = ["mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    for architecture, middle in ((MOE, ["mlp.router.weight", *experts]), (DENSE, dense)):
        expected = ["embedding.word_embeddings.weight"]
        expected += [f"decoder.layers.{number}.{name}" for number in range(2) for name in layer + middle + norms]
        expected += ["decoder.final_layernorm.weight"]
        if not architecture.tie_word_embeddings:
            expected += ["output_layer.weight"]
        assert [parameter.megatron_name for parameter in parameters(architecture)] == expected


def test_expert_parameters_know_their_layer_and_expert() -> None:
    for name, parameter in by_name(MOE).items():
        assert parameter.is_expert == (".local_experts." in name)
        assert (parameter.expert is not None) == parameter.is_expert
        assert parameter.layer == (int(name.split(".")[2]) if name.startswith("decoder.layers.") else None)
        if parameter.expert is not None:
            assert f".local_experts.{parameter.expert}." in name
            assert all(f"model.layers.{parameter.layer}.mlp.experts.{parameter.expert}." in hf for hf in parameter.hf_names)


def test_saved_keys_stack_layers_and_experts() -> None:
    named = by_name(MOE)
    fc1 = torch_dist_key(named["decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight"])
    assert (fc1.names, fc1.index) == (("decoder.layers.mlp.experts.experts.linear_fc1.weight",), (1, 2))
    norm = torch_dist_key(named["decoder.layers.1.input_layernorm.weight"])
    assert (norm.names, norm.index) == (("decoder.layers.self_attention.linear_qkv.layer_norm_weight",), (1,))
    pre_mlp = torch_dist_key(named["decoder.layers.0.pre_mlp_layernorm.weight"])
    assert pre_mlp.names == ("decoder.layers.pre_mlp_layernorm.weight", "decoder.layers.mlp.linear_fc1.layer_norm_weight")
    embedding = torch_dist_key(named["embedding.word_embeddings.weight"])
    assert (embedding.names, embedding.index) == (("embedding.word_embeddings.weight",), ())
    dense = torch_dist_key(by_name(DENSE)["decoder.layers.0.pre_mlp_layernorm.weight"])
    assert dense.names == ("decoder.layers.mlp.linear_fc1.layer_norm_weight",)


@pytest.mark.parametrize("architecture", [MOE, DENSE], ids=["moe", "dense"])
def test_no_two_parameters_share_a_saved_place(architecture: Architecture) -> None:
    places = [(name, torch_dist_key(p).index) for p in parameters(architecture) for name in torch_dist_key(p).names]
    assert len(places) == len(set(places))


def test_published_30b_index_is_covered_name_by_name_and_shape_by_shape(assets: Path) -> None:
    folder = assets / "models" / "qwen3_30b_a3b"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    published = {name: tuple(shape) for name, shape in json.loads((folder / "shapes.json").read_text()).items()}
    every = list(parameters(read_architecture(folder)))
    names = [name for parameter in every for name in parameter.hf_names]
    assert len(names) == len(set(names)) == 18867
    assert set(names) == set(index["weight_map"])
    shapes = {name: shape for p in every for name, shape in zip(p.hf_names, p.hf_shapes, strict=True)}
    assert shapes == published
    assert sum(2 * math.prod(shape) for shape in shapes.values()) == index["metadata"]["total_size"] == 61_064_245_248
    assert sum(math.prod(parameter.megatron_shape) for parameter in every) == 30_532_122_624
    assert check_hf_tensors(read_architecture(folder), published, source=folder) == ()


def test_size_that_cuts_through_a_group_or_leaves_a_rest_is_refused() -> None:
    named = by_name(MOE)
    with pytest.raises(ValueError, match=r"layers.0.self_attention.linear_qkv.weight: 4 key-value heads cannot be cut in 8 equal shards"):
        named["decoder.layers.0.self_attention.linear_qkv.weight"].shard_shape(8)
    with pytest.raises(ValueError, match="24 rows cannot be cut in 5"):
        named["embedding.word_embeddings.weight"].shard_shape(5)
    with pytest.raises(ValueError, match="size is 0"):
        named["embedding.word_embeddings.weight"].shard_shape(0)


def test_wrong_pieces_are_refused_by_name() -> None:
    fc1 = by_name(DENSE)["decoder.layers.0.mlp.linear_fc1.weight"]
    gate, up = (torch.zeros(shape) for shape in fc1.hf_shapes)
    with pytest.raises(ValueError, match=r"up_proj.weight: dtype is torch.bfloat16; expected torch.float32"):
        fc1.from_hf([gate, up.bfloat16()])
    with pytest.raises(ValueError, match=r"gate_proj.weight: shape is \(12, 20\); expected \(20, 12\)"):
        fc1.from_hf([gate.T, up])
    with pytest.raises(ValueError, match="made of 1 tensors"):
        fc1.from_hf([gate])
    with pytest.raises(ValueError, match=r"linear_fc1.weight: shape is \(20, 12\); expected \(40, 12\)"):
        fc1.to_hf(gate)
    full = fc1.from_hf([gate, up])
    with pytest.raises(ValueError, match="rank is 2; expected 0 to 1"):
        fc1.shard(full, 2, 2)
    with pytest.raises(ValueError, match=r"shape is \(40, 12\); expected \(20, 12\)"):
        fc1.unshard([full, full])
    with pytest.raises(ValueError, match="expected one dtype"):
        fc1.unshard([fc1.shard(full, 0, 2), fc1.shard(full, 1, 2).double()])


def test_replicated_copies_that_differ_in_one_bit_are_refused() -> None:
    norm = by_name(DENSE)["decoder.final_layernorm.weight"]
    assert norm.split is Split.REPLICATED
    weight = torch.full((12,), float("nan"))
    assert bits(norm.unshard([weight, weight.clone()])) == bits(weight)
    negative_zero, zero = torch.zeros(12).neg(), torch.zeros(12)
    with pytest.raises(ValueError, match=r"final_layernorm.weight: rank 1 of 2 differs"):
        norm.unshard([zero, negative_zero])


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    shapes = hf_shapes(MOE)
    renamed = dict(shapes)
    renamed["model.layers.0.mlp.router.weight"] = renamed.pop("model.layers.0.mlp.gate.weight")
    with pytest.raises(ValueError, match=r"missing 1: \['model.layers.0.mlp.gate.weight'\], not known 1: \['model.layers.0.mlp.router"):
        check_hf_tensors(MOE, renamed, source="x")
    with pytest.raises(ValueError, match=r"x: shape of lm_head.weight is \(24, 13\); expected \(24, 12\)"):
        check_hf_tensors(MOE, shapes | {"lm_head.weight": (24, 13)}, source="x")


def test_stored_copy_of_a_tied_head_is_reported() -> None:
    shapes = hf_shapes(DENSE)
    assert "lm_head.weight" not in shapes
    assert check_hf_tensors(DENSE, shapes, source="x") == ()
    assert check_hf_tensors(DENSE, shapes | {"lm_head.weight": (24, 12)}, source="x") == ("lm_head.weight",)
    with pytest.raises(ValueError, match=r"shape of lm_head.weight"):
        check_hf_tensors(DENSE, shapes | {"lm_head.weight": (12, 24)}, source="x")
