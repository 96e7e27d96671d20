"""Checksums of stacked parameters, computed from parts that stream by, equal those of the stack."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch

from rollout.weights.checksums import expected_checksums, server_parameter, tensor_checksum

LAYER = "model.layers.3."


def make_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"{LAYER}self_attn.{name}_proj.weight": torch.randn(rows, 8) for name, rows in (("q", 16), ("k", 4), ("v", 4))}
    for expert in range(12):  # two digits: sorted as text, 10 comes before 2
        tensors |= {f"{LAYER}mlp.experts.{expert}.{name}_proj.weight": torch.randn(32, 8) for name in ("gate", "up")}
        tensors[f"{LAYER}mlp.experts.{expert}.down_proj.weight"] = torch.randn(8, 32)
    return tensors


def test_tensor_checksum_is_the_beginning_of_sha256_over_row_major_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert tensor_checksum(tensor) == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
    assert tensor_checksum(tensor.T) == hashlib.sha256(tensor.numpy().T.tobytes(order="C")).hexdigest()[:16]


@pytest.mark.parametrize("order", ["as made", "sorted", "reversed", "shuffled"])
def test_parts_in_any_order_give_the_checksum_of_the_stack(order: str) -> None:
    tensors = make_tensors()
    names = list(tensors)
    random.Random(0).shuffle(names) if order == "shuffled" else None
    names = sorted(names) if order == "sorted" else names[::-1] if order == "reversed" else names
    found = expected_checksums(((name, tensors[name]) for name in names), dtype=torch.bfloat16)

    def stack(name: str) -> torch.Tensor:
        return torch.stack([tensors[f"{LAYER}mlp.experts.{expert}.{name}_proj.weight"] for expert in range(12)])

    expected = {
        f"{LAYER}self_attn.qkv_proj.weight": torch.cat([tensors[f"{LAYER}self_attn.{name}_proj.weight"] for name in "qkv"]),
        f"{LAYER}mlp.experts.w13_weight": torch.cat([stack("gate"), stack("up")], dim=1),
        f"{LAYER}mlp.experts.w2_weight": stack("down"),
    }
    assert found == {name: tensor_checksum(tensor.bfloat16()) for name, tensor in expected.items()}


def test_missing_and_repeated_parts_are_errors() -> None:
    tensors = make_tensors()
    without = [(name, tensor) for name, tensor in tensors.items() if ".k_proj" not in name]
    with pytest.raises(ValueError, match=r"part 1 of model\.layers\.3\.self_attn\.qkv_proj\.weight never came"):
        expected_checksums(without, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"k_proj\.weight came twice"):
        expected_checksums([*tensors.items(), (f"{LAYER}self_attn.k_proj.weight", torch.zeros(4, 8))], dtype=torch.float32)


def test_caller_may_reuse_its_buffer_between_tensors() -> None:
    tensors = make_tensors()
    buffer = torch.empty(16, 8)

    def through_one_buffer():  # type: ignore[no-untyped-def]
        for name in ("v", "k", "q"):  # the wrong way round, so that parts have to wait
            source = tensors[f"{LAYER}self_attn.{name}_proj.weight"]
            yield f"{LAYER}self_attn.{name}_proj.weight", buffer[: len(source)].copy_(source)

    parts = torch.cat([tensors[f"{LAYER}self_attn.{name}_proj.weight"] for name in "qkv"])
    assert expected_checksums(through_one_buffer(), dtype=torch.float32) == {f"{LAYER}self_attn.qkv_proj.weight": tensor_checksum(parts)}


def test_names_of_a_dense_model() -> None:
    assert server_parameter("model.layers.0.mlp.up_proj.weight") == ("model.layers.0.mlp.gate_up_proj.weight", 1)
    assert server_parameter("model.layers.0.mlp.down_proj.weight") == ("model.layers.0.mlp.down_proj.weight", 0)
    assert server_parameter("model.layers.0.self_attn.v_proj.bias") == ("model.layers.0.self_attn.qkv_proj.bias", 2)
    assert server_parameter("model.layers.0.self_attn.q_norm.weight") == ("model.layers.0.self_attn.q_norm.weight", 0)
