"""A written policy folder: transformers loads the very weights, both spellings of the config agree, nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.policy_folder import companion_files, export_policy, load_tokenizer, write_policy

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
}
DENSE = {**SHAPE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True}
MOE = {**SHAPE, **EXPERTS, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}


def weights_of(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_shapes(Architecture.from_config(config, source="test"))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], **changed: Any) -> None:
    architecture = Architecture.from_config(config, source="test")
    options = {"dtype": torch.float32, "config": config, "companions": {}, "replace": False}
    write_policy(folder, reversed(weights.items()), architecture, **{**options, **changed})


def per_expert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps the experts of a layer in one tensor, gate rows before up rows."""
    found = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            for e, fused in enumerate(tensor):
                half = fused.shape[0] // 2
                found[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = fused[:half]
                found[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = fused[half:]
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{e}.down_proj.weight"): part for e, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [DENSE, MOE], ids=["dense", "moe"])
def test_transformers_loads_every_weight_bit_for_bit(tmp_path: Path, family: dict[str, Any], tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = {**family, "tie_word_embeddings": tied}
    weights = weights_of(config)
    assert ("lm_head.weight" in weights) is not tied
    write(tmp_path / "policy", config, weights)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not any(report.values()), report
    loaded = per_expert(model.state_dict())
    expected = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]} if tied else weights
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_config_names_everything_in_both_spellings(tmp_path: Path, dtype: torch.dtype) -> None:
    config = {**MOE, "tie_word_embeddings": False, "torch_dtype": "float16"}
    weights = {name: weight.to(dtype) for name, weight in weights_of(config).items()}
    write(tmp_path / "policy", config, weights, dtype=dtype)
    written = json.loads((tmp_path / "policy/config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert (written["torch_dtype"], written["dtype"]) == (name, name)
    assert (written["num_experts"], written["num_local_experts"]) == (4, 4)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5000.0
    assert written["rope_parameters"]["rope_type"] == "default"


def test_tensors_that_do_not_fit_the_architecture_leave_no_folder(tmp_path: Path) -> None:
    config = {**DENSE, "tie_word_embeddings": False}
    weights = weights_of(config)
    missing = {name: weight for name, weight in weights.items() if name != "model.norm.weight"}
    misshapen = {**weights, "model.norm.weight": torch.zeros(15)}
    for wrong in (missing, misshapen, {**weights, "model.extra": torch.zeros(1)}):
        with pytest.raises(ValueError, match=r"model\.(norm\.weight|extra)"):
            write(tmp_path / "policy", config, wrong)
        assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    config = {**DENSE, "tie_word_embeddings": True}
    write(tmp_path / "policy", config, weights_of(config))
    before = (tmp_path / "policy/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="policy"):
        write(tmp_path / "policy", config, weights_of(config, seed=1))
    assert (tmp_path / "policy/model.safetensors").read_bytes() == before
    write(tmp_path / "policy", config, weights_of(config, seed=1), replace=True)
    assert (tmp_path / "policy/model.safetensors").read_bytes() != before


def test_a_tokenizer_made_here_is_written_for_both_transformers(tmp_path: Path, chain_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    chain_tokenizer.save_pretrained(tmp_path / "made")
    files = companion_files(tmp_path / "made")
    written = json.loads(files["tokenizer_config.json"])
    # transformers 4 has no class TokenizersBackend and takes extra_special_tokens for a dictionary of named tokens.
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in written
    assert written["additional_special_tokens"][:3] == ["<|user|>", "<|assistant|>", "<|system|>"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert companion_files(tmp_path) == files
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.all_special_tokens == chain_tokenizer.all_special_tokens
    text = "<|user|> 1 + 2 <|assistant|> 3 <|end|>"
    assert read(text)["input_ids"] == chain_tokenizer(text)["input_ids"]
    assert read.decode(read(text)["input_ids"], skip_special_tokens=True) == "1 + 2 3"
    assert read.chat_template == chain_tokenizer.chat_template and read.eos_token == "<|end|>"


def test_a_plain_tokenizer_is_loaded_as_autotokenizer_loads_it(tmp_path: Path, chain_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    chain_tokenizer.save_pretrained(tmp_path / "made")
    (tmp_path / "exported").mkdir()
    for name, content in companion_files(tmp_path / "made").items():
        (tmp_path / "exported" / name).write_bytes(content)
    for folder, plain in (("made", "TokenizersBackend"), ("exported", "PreTrainedTokenizerFast")):
        assert json.loads((tmp_path / folder / "tokenizer_config.json").read_text())["tokenizer_class"] == plain
        found, expected = load_tokenizer(tmp_path / folder), AutoTokenizer.from_pretrained(tmp_path / folder)
        assert type(found) is type(expected) and found.init_kwargs == expected.init_kwargs
        assert found.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
        assert found.chat_template == expected.chat_template and found.special_tokens_map == expected.special_tokens_map


def test_a_published_tokenizers_settings_stay_as_they_are(assets: Path) -> None:
    folder = assets / "models/qwen3_30b_a3b"
    assert companion_files(folder)["tokenizer_config.json"] == (folder / "tokenizer_config.json").read_bytes()


def test_an_export_keeps_config_and_tokenizer_of_the_model_it_came_from(tmp_path: Path, chain_tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = {**MOE, "tie_word_embeddings": False, "eos_token_id": 5, "custom": "kept"}
    base = tmp_path / "base"
    chain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer_files = companion_files(tmp_path / "tokenizer")
    write(base, config, weights_of(config), companions=tokenizer_files)
    (base / "training_notes.txt").write_text("stays behind")
    trained = weights_of(config, seed=1)
    export_policy(tmp_path / "policy", iter(trained.items()), dtype=torch.float32, like=base, replace=True)
    assert json.loads((tmp_path / "policy/config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "policy/config.json").read_text())["custom"] == "kept"
    assert companion_files(tmp_path / "policy") == tokenizer_files != {}
    assert not (tmp_path / "policy/training_notes.txt").exists()
    tokenizer = load_tokenizer(tmp_path / "policy")
    assert tokenizer("1 + 2")["input_ids"] == chain_tokenizer("1 + 2")["input_ids"]
    loaded = per_expert(AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict())
    assert all(torch.equal(loaded[name], weight) for name, weight in trained.items())


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, chain_tokenizer: Any) -> None:
    folder = tmp_path / "model"
    chain_tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder).eos_token_id == chain_tokenizer.eos_token_id
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}))
    with pytest.raises(ValueError, match=r"model: the tokenizer has no end-of-sequence token$"):
        load_tokenizer(folder)
