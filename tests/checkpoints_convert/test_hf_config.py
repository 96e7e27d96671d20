from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_convert.hf_config import Architecture, config_with_both_spellings, read_architecture, read_config

SHARED = {
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
}
EXPERTS = {"moe_intermediate_size": 32, "norm_topk_prob": True, "num_experts_per_tok": 2, "mlp_only_layers": [], "decoder_sparse_step": 1}
MOE_4: dict[str, Any] = {
    **SHARED, **EXPERTS, "model_type": "qwen3_moe", "tie_word_embeddings": False,
    "num_experts": 4, "rope_theta": 1000000.0, "rope_scaling": None, "torch_dtype": "bfloat16",
}  # fmt: skip
MOE_5: dict[str, Any] = {
    **SHARED, **EXPERTS, "model_type": "qwen3_moe", "tie_word_embeddings": False,
    "num_local_experts": 4, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16",
}  # fmt: skip
DENSE_5: dict[str, Any] = {
    **SHARED, "model_type": "qwen3", "tie_word_embeddings": True, "layer_types": ["full_attention"] * 2,
    "rope_parameters": {"rope_theta": 500, "rope_type": "default"}, "use_sliding_window": False, "sliding_window": None,
}  # fmt: skip


def test_both_spellings_of_one_model_read_as_one_architecture() -> None:
    assert Architecture.from_config(MOE_4, source="four") == Architecture.from_config(MOE_5, source="five")


def test_every_field_is_read_from_its_key() -> None:
    assert Architecture.from_config(MOE_5, source="config.json") == Architecture(
        model_type="qwen3_moe", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=96, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
        rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=512, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def test_dense_model_has_no_expert_fields_and_may_state_no_dtype() -> None:
    dense = Architecture.from_config(DENSE_5, source="config.json")
    assert not dense.is_moe
    assert (dense.num_experts, dense.num_experts_per_tok, dense.moe_intermediate_size, dense.norm_topk_prob) == (None,) * 4
    assert (dense.dtype, dense.rope_theta, dense.tie_word_embeddings, dense.num_query_heads_per_group) == (None, 500.0, True, 2)


def test_moe_head_dim_follows_transformers_when_absent() -> None:
    config = {key: value for key, value in MOE_4.items() if key != "head_dim"} | {"hidden_size": 96}
    assert Architecture.from_config(config, source="config.json").head_dim == 24
    assert config_with_both_spellings(config)["head_dim"] == 24


@pytest.mark.parametrize("config", [MOE_4, MOE_5, DENSE_5], ids=["moe_4", "moe_5", "dense_5"])
def test_completed_config_means_the_same_under_either_spelling_alone(config: dict[str, Any]) -> None:
    complete = config_with_both_spellings(config)
    expected = Architecture.from_config(config, source="config.json")
    four = {key: value for key, value in complete.items() if key not in ("num_local_experts", "rope_parameters", "dtype")}
    five = {key: value for key, value in complete.items() if key not in ("num_experts", "rope_theta", "torch_dtype")}
    for spelling in (complete, four, five):
        assert Architecture.from_config(spelling, source="config.json") == expected
    assert {key: complete[key] for key in config} == config
    assert config_with_both_spellings(complete) == complete


def test_completing_keeps_the_number_and_the_order_as_written() -> None:
    complete = config_with_both_spellings(DENSE_5)
    assert json.dumps(complete["rope_theta"]) == "500"
    assert list(complete)[: len(DENSE_5)] == list(DENSE_5)
    assert "num_experts" not in complete


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (MOE_4, {"model_type": "mixtral"}, "model_type is 'mixtral'"),
    (MOE_4, {"model_type": None}, "model_type is None"),
    (MOE_4, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    (MOE_4, {"attention_bias": True}, "attention_bias is True"),
    (MOE_4, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    (MOE_4, {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is True"),
    (DENSE_5, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    (MOE_4, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    (MOE_4, {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    (MOE_4, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
    (MOE_4, {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
    (MOE_4, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
    (MOE_4, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is"),
    (MOE_4, {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    (MOE_5, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters is"),
    (MOE_5, {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}}, "rope_parameters is"),
    (MOE_5, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters is"),
    (MOE_5, {"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
    (MOE_5, {"rope_theta": 10000.0}, "rope_parameters.rope_theta is 1000000.0; expected rope_theta = 10000.0"),
    (MOE_4, {"rope_theta": -1.0}, "rope_theta is -1.0"),
    (MOE_5, {"num_experts": 8}, "num_local_experts is 4; expected num_experts = 8"),
    (MOE_4, {"num_experts": None}, "num_experts is None"),
    (MOE_4, {"num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
    (MOE_4, {"norm_topk_prob": None}, "norm_topk_prob is None"),
    (DENSE_5, {"num_experts": 4}, "num_experts is 4"),
    (MOE_4, {"num_experts_per_tok": 1}, "num_experts_per_tok is 1; expected at least 2, as norm_topk_prob"),
    (MOE_4, {"architectures": ["Qwen3ForCausalLM"]}, "architectures is ['Qwen3ForCausalLM']; expected ['Qwen3MoeForCausalLM']"),
    (DENSE_5, {"architectures": ["Qwen3ForTokenClassification"]}, "architectures is ['Qwen3ForTokenClassification']"),
    (DENSE_5, {"architectures": []}, "architectures is []"),
    (DENSE_5, {"head_dim": None}, "head_dim is None"),
    (MOE_4, {"dtype": "float32"}, "dtype is 'float32'; expected torch_dtype = 'bfloat16'"),
    (MOE_4, {"torch_dtype": "float64"}, "torch_dtype is 'float64'"),
    (MOE_4, {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
    (MOE_4, {"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    (MOE_4, {"vocab_size": True}, "vocab_size is True"),
    (MOE_4, {"hidden_size": 0}, "hidden_size is 0"),
    (MOE_4, {"head_dim": 15}, "head_dim is 15"),
    (MOE_4, {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    (MOE_4, {"tie_word_embeddings": None}, "tie_word_embeddings is None"),
]


@pytest.mark.parametrize(("config", "change", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_another_architecture_is_refused_with_source_key_and_value(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Architecture.from_config(config | change, source="models/x/config.json")
    text = str(error.value)
    assert text.startswith(f"models/x/config.json: {message}") and "; expected " in text and "\n" not in text


def test_one_expert_per_token_without_renormalising_is_a_model() -> None:
    read = Architecture.from_config(MOE_4 | {"num_experts_per_tok": 1, "norm_topk_prob": False}, source="config.json")
    assert (read.num_experts_per_tok, read.norm_topk_prob) == (1, False)


@pytest.mark.parametrize("content", [None, "{", "[]", "\x00"], ids=["absent", "cut off", "a list", "not text"])
def test_unreadable_config_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_published_moe_config_reads(assets: Path) -> None:
    architecture = read_architecture(assets / "models" / "qwen3_30b_a3b")
    assert (architecture.num_hidden_layers, architecture.num_experts, architecture.num_experts_per_tok) == (48, 128, 8)
    assert (architecture.rope_theta, architecture.norm_topk_prob, architecture.dtype) == (1e6, True, "bfloat16")


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "heads", "tied"),
    [("0.6B", 28, 1024, 16, True), ("1.7B", 28, 2048, 16, True), ("4B", 36, 2560, 32, True),
     ("8B", 36, 4096, 32, False), ("14B", 40, 5120, 40, False), ("32B", 64, 5120, 64, False)],
)  # fmt: skip
def test_published_dense_configs_read(assets: Path, size: str, layers: int, hidden: int, heads: int, tied: bool) -> None:
    path = assets / "models" / "qwen3_dense_configs" / f"Qwen3-{size}.config.json"
    read = Architecture.from_config(json.loads(path.read_text()), source=path)
    assert (read.num_hidden_layers, read.hidden_size, read.num_attention_heads, read.tie_word_embeddings) == (layers, hidden, heads, tied)
    assert (read.num_key_value_heads, read.head_dim, read.is_moe, read.rope_theta) == (8, 128, False, 1e6)


def test_transformers_reads_the_completed_config_as_the_same_model() -> None:
    from transformers import Qwen3Config, Qwen3MoeConfig

    moe = Qwen3MoeConfig.from_dict(config_with_both_spellings(MOE_4))
    assert (moe.num_local_experts, moe.rope_parameters, moe.dtype) == (4, {"rope_theta": 1e6, "rope_type": "default"}, torch.bfloat16)
    dense = Qwen3Config.from_dict(config_with_both_spellings(DENSE_5))
    assert dense.rope_parameters == {"rope_theta": 500, "rope_type": "default"}
