"""The base model of a small run: random weights, then supervised learning on worked examples by the same actor."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoints_convert.dtypes import DTYPES
from checkpoints_convert.hf_config import Architecture
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.policy_folder import companion_files, load_tokenizer, write_policy
from megatron_minpro.config import ModelConfig, PromptsConfig, WarmUpConfig
from megatron_minpro.data.prompts import encode_prompts
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.loop.learning_rate import base_model_rate
from megatron_minpro.registry import PlugIns
from parallel.optimizer_settings import OptimizerSettings
from parallel.token_sequence import TokenSequence

if TYPE_CHECKING:
    from parallel.actor import MegatronActor  # the launcher, which makes no actor, starts without importing Megatron-Core

RECIPE_FILE = "warm_up.json"
OPTIMIZER = OptimizerSettings(weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8, gradient_clip=1.0)
_DEFAULT_INITIALIZER_RANGE = 0.02  # transformers'

# Called as plug_in(folder, **options); writes a tokenizer into the folder.
TOKENIZERS = PlugIns(setting="model.warm_up.tokenizer.name", options="model.warm_up.tokenizer", known={})
# Called as plug_in(prompts, seed, **options); gives (prompt, response) texts, as many as it likes.
EXAMPLES = PlugIns(setting="model.warm_up.examples.name", options="model.warm_up.examples", known={})


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
    if model.warm_up is None or not made.is_file() or made.read_text(encoding="utf-8") == recipe(model, prompts):
        return
    there, here = (_leaves(json.loads(text)) for text in (made.read_text(encoding="utf-8"), recipe(model, prompts)))
    differing = [f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in here | there if there.get(key) != here.get(key)]
    raise ValueError(
        f"model.path: {model.path} was made by another recipe ({'; '.join(differing[:4])}); expected another model.path, or "
        "model.warm_up=null to train the folder as it is"
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, without the sections themselves."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def check_examples(model: ModelConfig, prompts: PromptsConfig, tokenizer: Any) -> None:
    """Raises ValueError when the worked examples cannot be about these prompts, or there are none."""
    if model.warm_up is not None and model.warm_up.num_steps:
        next(_endless_examples(model.warm_up, prompts, tokenizer))


def check_plug_ins(warm_up: WarmUpConfig) -> None:
    """Raises PlugInError when a plug-in of the recipe cannot be used with its options."""
    if warm_up.tokenizer.name is not None:
        TOKENIZERS.find(warm_up.tokenizer.name, warm_up.tokenizer.options, passed=1)
    if warm_up.examples is not None:
        EXAMPLES.find(warm_up.examples.name, warm_up.examples.options, passed=2)


@contextmanager
def tokenizer_of(model: ModelConfig) -> Iterator[Any]:
    """The tokenizer the model has, or will have once it is made; its folder (name_or_path) exists inside the block."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(model.path)
        if not folder.exists():
            assert model.warm_up is not None
            tokenizer = model.warm_up.tokenizer
            folder = Path(made if tokenizer.folder is None else tokenizer.folder)
            if tokenizer.name is not None:
                TOKENIZERS.find(tokenizer.name, tokenizer.options, passed=1)(folder, **tokenizer.options)
        yield load_tokenizer(folder)


def write_initial_model(model: ModelConfig, prompts: PromptsConfig, destination: Path) -> None:
    """A Hugging Face folder with seeded random weights: norms 1, everything else normal with the config's initializer_range.

    Raises ValueError for an architecture that this project does not train.
    """
    warm_up = model.warm_up
    assert warm_up is not None
    with tokenizer_of(model) as tokenizer:
        companions = companion_files(Path(tokenizer.name_or_path))
    config, architecture = _config_of(model, tokenizer), architecture_of(model, tokenizer)
    companions.pop("generation_config.json", None)  # another model's sampling defaults
    companions["generation_config.json"] = json.dumps({"eos_token_id": tokenizer.eos_token_id, "do_sample": True}).encode()
    companions[RECIPE_FILE] = recipe(model, prompts).encode()
    write_policy(
        destination,
        _random_tensors(
            architecture,
            seed=warm_up.seed,
            scale=float(config.get("initializer_range", _DEFAULT_INITIALIZER_RANGE)),
            dtype=DTYPES[model.dtype],
        ),
        architecture,
        dtype=DTYPES[model.dtype],
        config=config,
        companions=companions,
        replace=False,
    )


def architecture_of(model: ModelConfig, tokenizer: Any) -> Architecture:
    """Of the model that is to be made. Raises ValueError for one that this project does not train, or with fewer rows than tokens."""
    architecture = Architecture.from_config(_config_of(model, tokenizer), source="model.warm_up.architecture")
    if architecture.vocab_size < len(tokenizer):
        raise ValueError(f"model.warm_up.architecture.vocab_size: {architecture.vocab_size}, the tokenizer has {len(tokenizer)} tokens")
    return architecture


def _config_of(model: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    """Its config.json."""
    assert model.warm_up is not None
    fields = model.warm_up.architecture
    return {
        "architectures": ["Qwen3MoeForCausalLM" if fields.get("model_type") == "qwen3_moe" else "Qwen3ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }


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
    """Supervised learning: token-mean cross-entropy of the examples' responses, AdamW, cosine rate. Collective.

    Args:
        actor: learns in place.
        warm_up: the recipe.
        prompts: the training prompts, which the examples may be about.
        tokenizer: of the model; its chat template is applied to the prompts, its end token ends the responses.
        report: report(step, loss) is called after every step, on all ranks.

    Raises:
        ValueError: the tokenizer has no end token, or the plug-in refuses the prompts or its options, or gives no examples.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token")
    examples = _endless_examples(warm_up, prompts, tokenizer)
    for step in range(warm_up.num_steps):
        batch = _training_sequences(list(islice(examples, warm_up.batch_size)), tokenizer)
        update = actor.update(batch, cross_entropy, learning_rate=base_model_rate(warm_up, step))
        report(step, update.loss)


def _endless_examples(warm_up: WarmUpConfig, prompts: PromptsConfig, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """What the plug-in gives; from the first one again when it has given all."""
    assert warm_up.examples is not None
    name, options = warm_up.examples.name, warm_up.examples.options
    source, _ = load_prompts(tokenizer=tokenizer, **prompts.model_dump())
    plug_in = EXAMPLES.find(name, options, passed=2)
    while True:
        empty = True
        try:
            for example in plug_in(source, warm_up.seed, **options):
                empty = False
                yield example
        except ValueError as error:
            raise EXAMPLES.refused(name, error) from error
        if empty:
            raise EXAMPLES.refused(name, ValueError("gave no examples"))


def _training_sequences(examples: Sequence[tuple[str, str]], tokenizer: Any) -> list[TokenSequence]:
    """The model learns the response and the end token, not the prompt."""
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in examples])
    responses = tokenizer([response for _, response in examples], add_special_tokens=False)["input_ids"]
    sequences = []
    for prompt, response in zip(prompts, responses, strict=True):
        token_ids = torch.tensor((*prompt, *response, tokenizer.eos_token_id))
        mask = torch.zeros(len(token_ids) - 1, dtype=torch.bool)
        mask[len(prompt) - 1 :] = True
        sequences.append(TokenSequence(token_ids=token_ids, loss_mask=mask, streams={}))
    return sequences


def cross_entropy(*, logprobs_T: Tensor, loss_mask_T: Tensor, global_tokens: int, **unused: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Mean negative log-likelihood over the trained tokens of the mini-batch."""
    return -torch.where(loss_mask_T, logprobs_T, 0.0).sum() / global_tokens, {}
