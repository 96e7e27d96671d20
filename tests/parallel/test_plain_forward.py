"""The plain forward pass against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.hf_config import read_architecture
from parallel.plain_forward import plain_logprobs

SHAPE: dict[str, Any] = {
    "vocab_size": 20_000,  # more than one part of the head
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"tie_word_embeddings": False},
    "dense, tied": {"tie_word_embeddings": True},
    "experts": {**EXPERTS, "tie_word_embeddings": False},
    "experts, not renormalised": {**EXPERTS, "norm_topk_prob": False, "tie_word_embeddings": False},
    "one expert per token": {**EXPERTS, "norm_topk_prob": False, "num_experts_per_tok": 1, "tie_word_embeddings": False},
}


def make(kind: str, folder: Path) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = {**SHAPE, **MODELS[kind]}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options)) if "num_experts" in options else Qwen3ForCausalLM(Qwen3Config(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise)
    model.save_pretrained(folder)
    return model.float().eval()


def in_export_order(folder: Path) -> list[tuple[str, torch.Tensor]]:
    tensors = load_file(folder / "model.safetensors")

    def place(name: str) -> tuple[int, str]:
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 99
        return (-1 if name == "model.embed_tokens.weight" else layer, name)

    return [(name, tensors[name]) for name in sorted(tensors, key=place)]


@pytest.mark.parametrize("kind", MODELS)
def test_logprobs_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = make(kind, tmp_path)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator) for length in (2, 17, 9)]
    found, narrow = plain_logprobs(
        in_export_order(tmp_path), read_architecture(tmp_path), sequences, temperature=0.7, dtypes=(torch.float64, torch.bfloat16)
    )
    for token_ids, logprobs, rounded in zip(sequences, found, narrow, strict=True):
        with torch.no_grad():
            logits_TV = model(token_ids[None, :-1]).logits[0] / 0.7
        expected = logits_TV.log_softmax(-1).gather(1, token_ids[1:, None])[:, 0]
        # transformers in float32: numbers near 10 out of sums of 24 terms, three layers.
        torch.testing.assert_close(logprobs.float(), expected, rtol=0, atol=2e-5)
        assert 0 < float((rounded - expected).abs().median()) < 0.5


def test_a_stream_without_a_layer_is_refused(tmp_path: Path) -> None:
    make("dense", tmp_path)
    architecture, tensors = read_architecture(tmp_path), in_export_order(tmp_path)
    sequences = [torch.tensor([1, 2, 3])]

    def score(stream: list[tuple[str, torch.Tensor]]) -> None:
        plain_logprobs(stream, architecture, sequences, temperature=1.0, dtypes=(torch.float64,))

    with pytest.raises(ValueError, match="weights of layer 2 came where layer 1 was expected"):
        score([item for item in tensors if "layers.1." not in item[0]])
    with pytest.raises(ValueError, match="weights of 2 layers came, expected 3"):
        score([item for item in tensors if "layers.2." not in item[0]])
