"""Small models and requests for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest

from parallel.layout import ParallelLayout
from parallel.optimizer_settings import OptimizerSettings
from parallel.rehearsal.request import RehearsalRequest
from tests.conftest import REPOSITORY

_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
DENSE = {"model_type": "qwen3", **_COMMON}
TIED = {**DENSE, "tie_word_embeddings": True}
MOE = {
    "model_type": "qwen3_moe",
    **_COMMON,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
DEEP = {**MOE, "num_hidden_layers": 4}
LENGTHS = (200, 180, 150, 290)  # packed into micro-batches of different lengths


def request(model: dict[str, Any], *, rank: int = 0, **changes: Any) -> RehearsalRequest:
    """A rank of a small run. changes: axes of the layout, and fields of the request."""
    axes = {field.name: changes.pop(field.name) for field in fields(ParallelLayout) if field.name in changes}
    values: dict[str, Any] = {
        "model": model,
        "model_name": "tiny",
        "layout": ParallelLayout(sequence_parallel=axes.get("tp", 1) > 1, **axes),
        "rank": rank,
        "dtype": "bfloat16",
        "recompute": "full",
        "max_tokens_per_micro_batch": 512,
        "logprob_chunk_tokens": 256,
        "temperature": 1.0,
        "optimizer": OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, gradient_clip=1.0),
        "megatron_options": {},
        "deterministic": False,
        "kept_weights": None,
        "lengths": LENGTHS,
        "prompt_tokens": 20,
        "update": "megatron_minpro.loop.rehearsed_update:update",
        "update_options": {"name": "minpro", "options": {"clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"}},
    }
    return RehearsalRequest(**{**values, **changes})


@contextmanager
def importable_tests() -> Iterator[None]:
    """The rehearsing process finds this folder's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(REPOSITORY), os.environ.get("PYTHONPATH", ""))).strip(os.pathsep))
        yield
