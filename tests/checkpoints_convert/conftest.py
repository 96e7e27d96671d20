"""Fixtures of the tests that drive `minpro convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.safetensors_io import write_checkpoint
from megatron_minpro import cli

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def _write_model(folder: Path, config: dict[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = hf_shapes(Architecture.from_config(config, source="test"))
    write_checkpoint(
        folder,
        ((name, torch.randn(shape, generator=generator).bfloat16()) for name, shape in shapes.items()),
        specs=[(name, shape, torch.bfloat16) for name, shape in shapes.items()],
        max_shard_bytes=20_000,
        extra_files={"config.json": json.dumps(config).encode()},
    )
    return folder


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE folder of several files, with random weights. Not to be changed."""
    return _write_model(tmp_path_factory.mktemp("good") / "model", CONFIG)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 1,000 tensors, which take a good part of a second."""
    return _write_model(tmp_path_factory.mktemp("many") / "model", CONFIG | {"num_hidden_layers": 24, "num_experts": 11})


@pytest.fixture(scope="session")
def megatron(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good folder, converted. Not to be changed."""
    folder = tmp_path_factory.mktemp("megatron") / "checkpoint"
    assert cli.run(["convert", "hf-to-megatron", str(good), str(folder)]) == 0
    return folder


@pytest.fixture
def check_refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], tuple[str, ...]], None]:
    """check_refused(arguments, needles): one line on stderr that holds all needles, exit code 2; 1 where the operating system refused."""

    def check(arguments: list[str], needles: tuple[str, ...]) -> None:
        capsys.readouterr()
        code = cli.run(["convert", *arguments])
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.strip()]
        assert code == 2 or (code == 1 and "[Errno" in error), error
        assert len(lines) == 1 and lines[0].startswith("minpro: error: ") and len(lines[0]) < 1500, error
        for needle in needles:
            assert needle in error

    return check
