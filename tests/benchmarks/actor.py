"""The actor's update against transformers doing the same model."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rows import Row, median_seconds
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.objectives import make_objective
from megatron_minpro.trainer import make_loss_function
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import detect
from parallel.layout import ParallelLayout
from parallel.optimizer import OptimizerSettings
from parallel.packing import TokenSequence


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    return [actor_against_transformers(folder / "model")]


def actor_against_transformers(folder: Path) -> Row:
    """Forward and backward of 16 packed sequences of 128 tokens: the actor's update against transformers with eager experts."""
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.save_pretrained(folder)
    token_ids = torch.randint(0, 512, (16, 129))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def theirs() -> None:
        optimizer.zero_grad()
        logits = model(token_ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()).backward()
        optimizer.step()

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    layout = ParallelLayout(world_size=1)
    groups = process_groups.initialize(layout, backend="gloo", seed=0, timeout_s=60)
    settings = ActorSettings(
        dtype=torch.float32,
        recompute="none",
        max_tokens_per_micro_batch=4096,
        logprob_chunk_tokens=4096,
        temperature=1.0,
        optimizer=OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, gradient_clip=1.0),
        megatron_options={},
    )
    actor = MegatronActor(read_architecture(folder), layout, groups, detect(), settings)
    with SafetensorsReader(folder) as reader:
        actor.load_hugging_face(reader.read)
    stream = {"behaviour_logprobs": torch.full((128,), -6.0), "advantages": torch.ones(128)}
    sequences = [TokenSequence(token_ids=row, loss_mask=torch.ones(128, dtype=torch.bool), streams=stream) for row in token_ids]
    loss_fn = make_loss_function(make_objective("minpro"))
    row = Row(
        name="actor update (MinPRO, entropy, metrics), 2,048 tokens, 4 layers of 128, 8 experts",
        seconds=median_seconds(lambda: actor.update(sequences, loss_fn, learning_rate=1e-4), repeats=10),
        peer="transformers forward, cross-entropy, backward, AdamW",
        peer_seconds=median_seconds(theirs, repeats=10),
        target=1.0,
    )
    process_groups.shut_down()
    return row
