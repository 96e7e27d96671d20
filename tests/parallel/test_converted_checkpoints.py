"""Converted checkpoints on real gloo ranks: Megatron loads them on any layout, and what its actor saves is what transformers then loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_convert.convert import hf_to_megatron, megatron_to_hf
from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.megatron_weights import MegatronWeights
from rollout.ports import free_ports
from tests.rank_pool import RankPool

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"world_size": 2, "tp": 2, "sequence_parallel": True},
    "ep2": {"world_size": 2, "ep": 2},
    "pp2": {"world_size": 2, "pp": 2, "layers_per_stage": [1, 2]},
    "tp2_ep2_etp1": {"world_size": 2, "tp": 2, "sequence_parallel": True, "ep": 2, "etp": 1},
}
LENGTHS = (19, 7, 24, 13)


@pytest.fixture(scope="module", params=["moe", "dense_tied"])
def family(request: pytest.FixtureRequest, ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model by transformers, converted; and what actors of every layout made of it, in one launch."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

    folder = tmp_path_factory.mktemp(request.param)
    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": request.param == "dense_tied",
        "initializer_range": 0.2,
    }
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, **experts) if request.param == "moe" else Qwen3Config(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # else all norms are alike, and exchanging two shows nowhere
                parameter.add_(0.1 * torch.randn(parameter.shape))
    source = folder / "hf"
    model.save_pretrained(source)
    sequences = [torch.randint(0, 96, (length,)) for length in LENGTHS]
    streams: dict[str, torch.Tensor] = {}
    for i, token_ids in enumerate(sequences):
        ones = torch.ones(len(token_ids) - 1)
        streams |= {
            f"token_ids.{i}": token_ids,
            f"loss_mask.{i}": ones.bool(),
            f"behaviour_logprobs.{i}": -ones,
            f"advantages.{i}": ones.clone(),
        }
    save_file(streams, source / "sequences.safetensors")
    hf_to_megatron(source, folder / "converted", workers=2)
    layouts = {name: layout for name, layout in LAYOUTS.items() if request.param == "moe" or "ep" not in layout}
    asked = {"fixture": str(source), "converted": str(folder / "converted"), "out": str(folder), "layouts": layouts, "padded": "tp2"}
    asked["ports"] = free_ports("127.0.0.1", len(layouts))
    ranks.run(Path(__file__).with_name("converted_ranks.py"), json.dumps(asked), world_size=2)
    return {
        "folder": folder,
        "source": source,
        "sequences": sequences,
        "weights": load_file(source / "model.safetensors"),
        "layouts": list(layouts),
        "results": {name: load_file(folder / f"{name}.safetensors") for name in layouts},
    }


def select(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.ranks
def test_an_actor_of_any_layout_starts_from_a_converted_checkpoint(family: dict[str, Any]) -> None:
    assert len(family["layouts"]) >= 2
    for name in family["layouts"]:
        check_equal(select(family["results"][name], "loaded."), family["weights"])
        check_equal(select(family["results"][name], "read."), family["weights"])


@pytest.mark.ranks
def test_a_padded_vocabulary_is_loaded_and_cut_back(family: dict[str, Any], tmp_path: Path) -> None:
    found = select(family["results"]["tp2"], "padded.")
    assert found["model.embed_tokens.weight"].shape[0] == 128
    check_equal({name: tensor[:96] if tensor.shape[0] == 128 else tensor for name, tensor in found.items()}, family["weights"])
    megatron_to_hf(family["folder"] / "tp2_padded", tmp_path / "out", config=family["source"], workers=2)
    check_equal(load_file(tmp_path / "out/model.safetensors"), family["weights"])


@pytest.mark.ranks
def test_what_the_actor_saved_has_its_logprobs_in_transformers(family: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in family["layouts"]:
        megatron_to_hf(family["folder"] / name, tmp_path / name, config=family["source"], workers=2)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        check_equal(load_file(tmp_path / name / "model.safetensors"), family["weights"])
        for i, token_ids in enumerate(family["sequences"]):
            with torch.no_grad():
                logprobs = model(token_ids[None, :-1]).logits[0].log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
            # 1e-5: fp32 rounding of sums of 100 terms in another order
            torch.testing.assert_close(family["results"][name][f"logprobs.{i}"], logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.ranks
def test_tensor_parallel_chunks_are_read_row_by_row(family: dict[str, Any]) -> None:
    """linear_proj and linear_fc2 are cut by columns there: no row of them is in one piece."""
    with MegatronWeights(family["folder"] / "tp2", read_architecture(family["source"])) as weights:
        for name, expected in family["weights"].items():
            assert torch.equal(weights.read(name), expected)
            assert torch.equal(weights.read_rows(name, 1, 4), expected[1:4])
