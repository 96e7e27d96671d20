"""verify: two checkpoints of either format, and one against its manifest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints_convert.convert import hf_to_megatron
from checkpoints_convert.inspection import inspect
from checkpoints_convert.verify import check_manifest, compare
from tests.checkpoints_convert.small_models import DENSE, MOE, random_weights, write_model


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_model(tmp_path / "hf", MOE, random_weights(MOE), max_shard_bytes=40_000)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=2)
    return tmp_path


def test_a_checkpoint_equals_itself_in_the_other_format(folders: Path) -> None:
    for first, second in (("hf", "megatron"), ("megatron", "hf"), ("hf", "hf"), ("megatron", "megatron")):
        found = compare(folders / first, folders / second, workers=2)
        assert (found.num_tensors, found.num_differences, found.first_difference) == (66, 0, None)
        assert found.num_bytes == sum(tensor.nbytes for tensor in random_weights(MOE).values())


def test_the_first_differing_element_is_named_with_both_values(folders: Path) -> None:
    weights = random_weights(MOE)
    for name, row in (("model.layers.2.mlp.experts.3.down_proj.weight", 7), ("model.layers.1.self_attn.k_proj.weight", 9)):
        weights[name] = weights[name].clone()
        weights[name][row, 5] = 64.0
    write_model(folders / "changed", MOE, weights)
    for first in ("hf", "megatron"):
        found = compare(folders / first, folders / "changed", workers=2)
        assert found.num_differences == 2
        assert found.first_difference is not None
    old = random_weights(MOE)["model.layers.1.self_attn.k_proj.weight"][9, 5].item()
    assert f"'model.layers.1.self_attn.k_proj.weight' differs first at (9, 5): 64.0, but {old} in" in found.first_difference


def test_a_difference_that_compares_equal_as_a_number_is_found(tmp_path: Path) -> None:
    weights = random_weights(DENSE)
    for name, value in (("zero", 0.0), ("minus_zero", -0.0)):
        changed = weights | {"model.norm.weight": torch.full((32,), value, dtype=torch.bfloat16)}
        write_model(tmp_path / name, DENSE, changed)
    assert compare(tmp_path / "zero", tmp_path / "minus_zero", workers=1).num_differences == 1
    assert compare(tmp_path / "zero", tmp_path / "zero", workers=1).num_differences == 0


def test_missing_tensors_other_shapes_and_dtypes_are_differences(tmp_path: Path) -> None:
    weights = random_weights(DENSE)
    write_model(tmp_path / "a", DENSE, weights)
    others = {
        "has no 'model.norm.weight'": {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"},
        "is torch.bfloat16 (31,)": weights | {"model.norm.weight": weights["model.norm.weight"][:31].clone()},
        "is torch.float32 (32,)": weights | {"model.norm.weight": weights["model.norm.weight"].float()},
    }
    for number, (message, other) in enumerate(others.items()):
        write_model(tmp_path / f"b{number}", DENSE, other)
        found = compare(tmp_path / "a", tmp_path / f"b{number}", workers=1)
        assert found.num_differences == 1
        assert message in str(found.first_difference)


def test_a_stored_copy_of_a_tied_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    config = {**DENSE, "tie_word_embeddings": True}
    weights = random_weights(config)
    write_model(tmp_path / "without", config, weights)
    for name, factor in (("with", 1), ("other", 2)):
        write_model(tmp_path / name, config, weights | {"lm_head.weight": factor * weights["model.embed_tokens.weight"]})
    assert compare(tmp_path / "without", tmp_path / "with", workers=1).num_differences == 0
    found = compare(tmp_path / "other", tmp_path / "without", workers=1)
    assert (found.num_differences, "lm_head.weight" in str(found.first_difference)) == (1, True)


def test_tensors_without_axes_are_compared_too(tmp_path: Path) -> None:
    """The scales of an fp8 checkpoint are such tensors."""
    weights = random_weights(DENSE)
    for name, scale in (("a", 0.5), ("b", 0.25)):
        write_model(tmp_path / name, DENSE, weights | {"model.layers.0.mlp.up_proj.weight_scale": torch.tensor(scale)})
    found = compare(tmp_path / "a", tmp_path / "b", workers=1)
    assert found.num_differences == 1
    assert "'model.layers.0.mlp.up_proj.weight_scale' differs first at (): 0.25, but 0.5 in" in str(found.first_difference)
    assert compare(tmp_path / "a", tmp_path / "a", workers=1).num_differences == 0


def test_the_manifest_tells_one_flipped_bit_and_where(folders: Path) -> None:
    assert check_manifest(folders / "megatron", workers=2).num_differences == 0
    path = folders / "megatron/__0_0.distcp"
    payload = random_weights(MOE)["model.layers.0.self_attn.o_proj.weight"].view(torch.uint8).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(payload) + 100] ^= 1
    path.write_bytes(content)
    found = check_manifest(folders / "megatron", workers=2)
    assert found.num_differences == 1
    assert "'model.layers.0.self_attn.o_proj.weight' has XXH3 hash" in str(found.first_difference)
    with pytest.raises(ValueError, match=r"has no minpro_manifest\.json"):
        check_manifest(folders / "hf", workers=1)


def test_inspection_counts_both_formats(folders: Path) -> None:
    weights = random_weights(MOE)
    parameters = sum(tensor.numel() for tensor in weights.values())
    hf, megatron = inspect(folders / "hf"), inspect(folders / "megatron")
    assert (hf.format, hf.num_tensors, hf.num_parameters, hf.num_bytes) == ("huggingface", 66, parameters, 2 * parameters)
    # 8 tensors of layers, 2 of the vocabulary, the last norm; and the norm before the experts a second time
    assert (megatron.format, megatron.num_tensors, megatron.num_parameters) == ("torch_dist", 13, parameters + 3 * 32)
    assert (megatron.model_type, megatron.has_manifest, hf.has_manifest) == ("qwen3_moe", True, False)
