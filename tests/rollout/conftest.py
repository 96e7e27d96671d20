"""Servers: a real one on the CPU with a tiny random Qwen3-MoE, shared by all tests that need one, and stubs without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollout.sglang.server import ServerPool, ServerSettings
from tests.rollout.generate_stub import Answer, Stub

VOCAB_SIZE = 40
EOS = 1


def make_model(seed: int) -> Qwen3MoeForCausalLM:
    """A random float32 Qwen3-MoE: 2 layers, 4 experts, grouped-query attention."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
        dtype="float32",
    )
    model = Qwen3MoeForCausalLM(config).float().eval()
    with torch.no_grad():  # norms are all ones at first: equal checksums would hide a mix-up of layers
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.rand_like(parameter)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture(scope="session")
def base_model() -> Qwen3MoeForCausalLM:
    return make_model(0)


@pytest.fixture(scope="session")
def model_folder(base_model: Qwen3MoeForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_moe")
    base_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server_settings(model_folder: Path) -> ServerSettings:
    return ServerSettings(
        model_path=model_folder,
        device="cpu",
        tp=1,
        dtype="float32",
        seed=0,
        deterministic=True,
        max_total_tokens=16384,
        max_running_requests=64,
        return_routes=True,
    )


@pytest.fixture(scope="session")
def server_pool(server_settings: ServerSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    """A running server. A test that publishes weights puts the base model's back (`published_base`)."""
    with ServerPool.start(server_settings, num_servers=1, log_dir=tmp_path_factory.mktemp("servers"), start_timeout_s=900) as pool:
        yield pool
        assert all(process.is_running for process in pool.processes)


@pytest.fixture
def stub() -> Iterator[Callable[[Answer], Stub]]:
    made: list[Stub] = []

    def make(answer: Answer) -> Stub:
        made.append(Stub(answer))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()
