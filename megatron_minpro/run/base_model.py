"""The base model of a small run: random weights, then supervised learning on the task's worked examples by the same actor."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.policy_folder import companion_files, load_tokenizer, write_policy
from megatron_minpro.config import ModelConfig, PromptsConfig, WarmUpConfig
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.tasks.arithmetic_chains.chains import (
    ArithmeticChains,
    WorkedExample,
    WorkedExampleNoise,
    WorkedExamples,
    build_tokenizer,
)
from parallel.actor import LocalTokens, LossOutput, MegatronActor
from parallel.packing import TokenSequence

RECIPE_FILE = "warm_up.json"
_DEFAULT_INITIALIZER_RANGE = 0.02  # transformers'
_LEARNING_RATE_WARM_UP = 50  # optimizer steps


def recipe(model: ModelConfig, prompts: PromptsConfig) -> str:
    """Everything that determines the base model, as kept in its folder."""
    assert model.warm_up is not None
    task = {"source": prompts.source, "options": prompts.options} if model.warm_up.num_steps else None
    return (
        json.dumps({"warm_up": model.warm_up.model_dump(mode="json"), "task": task, "dtype": model.dtype}, indent=2, sort_keys=True) + "\n"
    )


def check_recipe(model: ModelConfig, prompts: PromptsConfig) -> None:
    """Raises ValueError when model.path holds a base model that was made in another way than the config says."""
    made = Path(model.path) / RECIPE_FILE
    if model.warm_up is not None and made.is_file() and made.read_text(encoding="utf-8") != recipe(model, prompts):
        raise ValueError(f"model.path: {model.path} was made by another recipe (see its {RECIPE_FILE}); delete it or choose another path")


@contextmanager
def tokenizer_of(model: ModelConfig, prompts: PromptsConfig) -> Iterator[Any]:
    """The tokenizer the model has, or will have once it is made; its folder (name_or_path) exists inside the block."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(model.path)
        if not folder.exists():
            assert model.warm_up is not None
            folder = Path(made if model.warm_up.tokenizer is None else model.warm_up.tokenizer)
            if model.warm_up.tokenizer is None:
                build_tokenizer(folder, modulus=int(prompts.options.get("modulus", 10)))
        yield load_tokenizer(folder)


def write_initial_model(model: ModelConfig, prompts: PromptsConfig, destination: Path) -> None:
    """A Hugging Face folder with seeded random weights: norms 1, everything else normal with the config's initializer_range.

    Raises ValueError for an architecture that this project does not train.
    """
    warm_up = model.warm_up
    assert warm_up is not None
    with tokenizer_of(model, prompts) as tokenizer:
        companions = companion_files(Path(tokenizer.name_or_path))
    fields = dict(warm_up.architecture)
    model_type = fields.get("model_type")
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if model_type == "qwen3_moe" else "Qwen3ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }
    architecture = Architecture.from_config(config, source="model.warm_up.architecture")
    if architecture.vocab_size < len(tokenizer):
        raise ValueError(f"model.warm_up.architecture.vocab_size: {architecture.vocab_size}, the tokenizer has {len(tokenizer)} tokens")
    companions.pop("generation_config.json", None)  # another model's sampling defaults
    companions["generation_config.json"] = json.dumps({"eos_token_id": tokenizer.eos_token_id, "do_sample": True}).encode()
    companions[RECIPE_FILE] = recipe(model, prompts).encode()
    write_policy(
        destination,
        _random_tensors(
            architecture,
            seed=warm_up.seed,
            scale=float(fields.get("initializer_range", _DEFAULT_INITIALIZER_RANGE)),
            dtype=DTYPES[model.dtype],
        ),
        architecture,
        dtype=DTYPES[model.dtype],
        config=config,
        companions=companions,
        replace=False,
    )


def _random_tensors(architecture: Architecture, *, seed: int, scale: float, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name, shape in hf_shapes(architecture).items():
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=dtype)
        else:
            yield name, (torch.randn(shape, generator=generator) * scale).to(dtype)


def warm_up_actor(
    actor: MegatronActor, warm_up: WarmUpConfig, prompts: PromptsConfig, tokenizer: Any, *, report: Callable[[int, float], None]
) -> None:
    """Supervised learning: token-mean cross-entropy of the worked examples' responses, AdamW, cosine rate. Collective.

    report(step, loss) is called after every step, on all ranks. Raises ValueError for a prompt source without worked examples.
    """
    source, _ = load_prompts(tokenizer=tokenizer, **prompts.model_dump())
    if not isinstance(source, ArithmeticChains):
        raise ValueError(f"model.warm_up.num_steps: {warm_up.num_steps}, but {prompts.source!r} has no worked examples; use 0")
    examples = WorkedExamples(source, tokenizer, noise=WorkedExampleNoise(**warm_up.noise), seed=warm_up.seed)
    for step in range(warm_up.num_steps):
        batch = [_training_sequence(example) for example in examples.batch(step * warm_up.batch_size, warm_up.batch_size)]
        update = actor.update(batch, cross_entropy, learning_rate=cosine_rate(step, warm_up.num_steps, peak=warm_up.learning_rate))
        report(step, update.loss)


def _training_sequence(example: WorkedExample) -> TokenSequence:
    prompt = example.prompt.token_ids
    token_ids = torch.tensor(prompt + example.response_token_ids)
    mask = torch.zeros(len(token_ids) - 1, dtype=torch.bool)
    mask[len(prompt) - 1 :] = True
    return TokenSequence(token_ids=token_ids, loss_mask=mask, streams={})


def cross_entropy(local: LocalTokens) -> LossOutput:
    """Mean negative log-likelihood over the trained tokens of the mini-batch."""
    loss = -torch.where(local.loss_mask_T, local.logprobs_T, 0.0).sum() / local.global_tokens
    return LossOutput(loss=loss, metrics={})


def cosine_rate(step: int, num_steps: int, *, peak: float) -> float:
    """Linear over the first 50 steps, then a cosine from `peak` down to a twentieth of it (Loshchilov & Hutter, arXiv:1608.03983)."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    return peak * min(1.0, (step + 1) / _LEARNING_RATE_WARM_UP) * (0.05 + 0.95 * cosine)
