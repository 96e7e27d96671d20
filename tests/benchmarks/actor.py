"""The actor's update against transformers doing the same model, side by side; and its two ways to multiply experts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rows import Row
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from checkpoints_convert.hf_config import read_architecture
from checkpoints_convert.mapping import Architecture
from checkpoints_convert.safetensors_io import SafetensorsReader
from megatron_minpro.loop.update import make_loss_function
from megatron_minpro.objectives import make_objective
from parallel import process_groups
from parallel.actor import ActorSettings, MegatronActor
from parallel.capabilities import Capabilities, detect
from parallel.layers.experts import Product, grouped_linear, loop_linear
from parallel.layout import ParallelLayout
from parallel.optimizer_settings import OptimizerSettings
from parallel.token_sequence import TokenSequence

SMALL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
LARGE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
}
LEARNING_RATE = 1e-5


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    groups = start_alone(detect())
    try:
        return [
            actor_against_transformers("4 layers of 128, 8 experts", SMALL, 16, groups, folder / "small", rounds=20),
            actor_against_transformers("8 layers of 256, 32 experts", LARGE, 8, groups, folder / "large", rounds=10),
            loop_against_grouped(),
        ]
    finally:
        process_groups.shut_down()


def actor_against_transformers(
    name: str, shape: Mapping[str, int], num_sequences: int, groups: process_groups.ProcessGroups, folder: Path, *, rounds: int
) -> Row:
    """Forward, backward, clipping and AdamW over sequences of 128 tokens; the peer takes them as one batch without padding.

    Ours computes the MinPRO loss, every token's log-probability and entropy, and all metrics; the peer cross-entropy alone. Its experts
    run the fastest way that transformers has (batched_mm, ten times slower here, is left out) and its AdamW is torch's fused one.
    """
    model = write_model(folder, shape)
    token_ids = torch.randint(0, shape["vocab_size"], (num_sequences, 129))
    with SafetensorsReader(folder) as reader:
        actor = build_actor(read_architecture(folder), groups, detect(), reader.read, dtype=torch.float32, max_tokens=4096)
    sequences = make_sequences(token_ids)
    loss_fn = make_loss_function(make_objective("minpro"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)

    def transformers_update(implementation: str) -> None:
        model.set_experts_implementation(implementation)
        logits = model(token_ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ways = {
        "actor": lambda: actor.update(sequences, loss_fn, learning_rate=LEARNING_RATE),
        "eager": lambda: transformers_update("eager"),
        "grouped_mm": lambda: transformers_update("grouped_mm"),
    }
    seconds = least_seconds(ways, rounds=rounds)
    ours = seconds.pop("actor")
    fastest = min(seconds, key=seconds.__getitem__)
    return Row(
        name=f"actor update (MinPRO, entropy, metrics), {token_ids[:, 1:].numel():,} tokens, {name}",
        seconds=ours,
        peer=f"transformers forward, cross-entropy, backward, clipping, fused AdamW; {fastest} experts",
        peer_seconds=seconds[fastest],
        target=1.0,
    )


def loop_against_grouped() -> Row:
    """One expert layer's two matrix products per token and expert, forward and backward, gradients added to Megatron's buffer."""
    num_experts, tokens_per_expert, hidden_size, expert_size = 32, 128, 256, 128
    counts = torch.full((num_experts,), tokens_per_expert)
    tokens = torch.randn(num_experts * tokens_per_expert, hidden_size, requires_grad=True)
    first = [torch.randn(2 * expert_size, hidden_size, requires_grad=True) for _ in range(num_experts)]
    second = [torch.randn(hidden_size, expert_size, requires_grad=True) for _ in range(num_experts)]
    for weight in (*first, *second):
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]

    def linear(product: Product, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if product == "loop":
            return loop_linear(x, counts, weights, into_main_grad=True)
        return grouped_linear(x, counts, weights)

    def layer(product: Product) -> None:
        linear(product, linear(product, tokens, first)[:, :expert_size].contiguous(), second).sum().backward()
        for weight in (*first, *second):
            if product == "grouped":
                weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
            weight.grad = None

    seconds = least_seconds({"loop": lambda: layer("loop"), "grouped": lambda: layer("grouped")}, rounds=50)
    return Row(
        name="experts as a loop of products, 4,096 tokens over 32 experts of 256 x 128, forward and backward",
        seconds=seconds["loop"],
        peer="torch.nn.functional.grouped_mm on stacked weights",
        peer_seconds=seconds["grouped"],
        target=1.0,
    )


def least_seconds(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Least CPU seconds of each way, after two runs that warm up. Ways alternate, so that a slow spell of the machine meets them all.

    One thread computes and nothing waits: CPU seconds are wall seconds on an idle machine.
    """
    seconds = dict.fromkeys(ways, float("inf"))
    for number in range(-2, rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number >= 0:
                seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def start_alone(capabilities: Capabilities) -> process_groups.ProcessGroups:
    """Process groups of a single rank: this process."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29555")
    return process_groups.initialize(ParallelLayout(world_size=1), backend=capabilities.backend, seed=0, timeout_s=60)


def write_model(folder: Path, shape: Mapping[str, int]) -> Qwen3MoeForCausalLM:
    """A randomly initialised Qwen3-MoE in fp32, in memory and as a Hugging Face folder."""
    config = Qwen3MoeConfig(
        **shape,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.save_pretrained(folder)
    return model


def build_actor(
    architecture: Architecture,
    groups: process_groups.ProcessGroups,
    capabilities: Capabilities,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_tokens: int,
    gradient_clip: float = 1.0,
) -> MegatronActor:
    """An actor on a single rank. read: a Hugging Face name -> its tensor."""
    settings = ActorSettings(
        dtype=dtype,
        recompute="none",
        max_tokens_per_micro_batch=max_tokens,
        logprob_chunk_tokens=1024,
        temperature=1.0,
        optimizer=OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, gradient_clip=gradient_clip),
        megatron_options={},
    )
    actor = MegatronActor(architecture, ParallelLayout(world_size=1), groups, capabilities, settings)
    actor.load_hugging_face(read)
    return actor


def make_sequences(token_ids: Tensor) -> list[TokenSequence]:
    """Every token trained, the sampler slightly elsewhere: [S, L + 1] -> S sequences of L positions."""
    generator = torch.Generator().manual_seed(0)
    num_positions = token_ids.size(1) - 1
    uniform = -torch.tensor(float(token_ids.max()) + 1).log()
    return [
        TokenSequence(
            token_ids=row,
            loss_mask=torch.ones(num_positions, dtype=torch.bool),
            streams={
                "behaviour_logprobs": uniform + 0.1 * torch.randn(num_positions, generator=generator),
                "advantages": torch.randn(1, generator=generator).expand(num_positions).clone(),
            },
        )
        for row in token_ids
    ]
