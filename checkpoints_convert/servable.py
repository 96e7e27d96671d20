"""Models that SGLang loads without an error but computes wrongly."""

from __future__ import annotations

from pathlib import Path

from checkpoints_convert.adapters import refuse_adapter
from checkpoints_convert.hf_config import Architecture, read_config

_TIED_EXPERTS = (
    "tie_word_embeddings is True in a qwen3_moe model; expected False (SGLang gives this model a head of its own and never fills it)"
)
# Parts of class names of models that sample no text.
_NOT_GENERATIVE = ("Classification", "QuestionAnswering", "RewardModel")


def refuse_unservable(folder: Path) -> None:
    """Refuse a model folder of any model type that must not be sampled from.

    Raises:
        ValueError: config.json is missing, the model generates no text, its head is never loaded, or an adapter lies beside it.
    """
    config, source = read_config(folder), folder / "config.json"
    for name in config.get("architectures") or ():
        if any(part in str(name) for part in _NOT_GENERATIVE):
            raise ValueError(
                f"{source}: architectures is {config['architectures']!r}; expected a model that generates text, ...ForCausalLM"
            )
    if config.get("model_type") == "qwen3_moe" and config.get("tie_word_embeddings") is True:
        raise ValueError(f"{source}: {_TIED_EXPERTS}")
    refuse_adapter(folder)


def refuse_tied_experts(architecture: Architecture, *, source: str | Path) -> None:
    """Raises ValueError for a Qwen3-MoE whose head is its embedding: it can be converted, but not sampled from."""
    if architecture.is_moe and architecture.tie_word_embeddings:
        raise ValueError(f"{source}: {_TIED_EXPERTS}")
