"""Small Qwen3 folders with random weights, made without building a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.safetensors_io import write_checkpoint

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MOE: dict[str, Any] = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of the model, bf16, in the order of transformers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = hf_shapes(Architecture.from_config(config, source="config"))
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def write_model(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], *, max_shard_bytes: int = 10**9) -> None:
    """A folder as published ones are: weights, index, config.json, tokenizer and generation files."""
    extra = {name: json.dumps({"of": name}).encode() for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json")}
    write_checkpoint(
        folder,
        weights.items(),
        specs=[(name, tensor.shape, tensor.dtype) for name, tensor in weights.items()],
        max_shard_bytes=max_shard_bytes,
        extra_files={**extra, "config.json": json.dumps(config).encode()},
    )
