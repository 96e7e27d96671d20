"""What transformers says about the tokens that a server sampled, and a model's weights under their checkpoint names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rollout.records import Generation


def reference_logprobs(model: PreTrainedModel, generation: Generation, *, temperature: float) -> list[float]:
    """Natural-log probabilities of the response tokens, from one forward pass over the whole sequence."""
    token_ids = torch.tensor([generation.prompt_token_ids + generation.response_token_ids])
    with torch.no_grad():
        logits = model(token_ids).logits[0, len(generation.prompt_token_ids) - 1 : -1] / temperature
    chosen = torch.tensor(generation.response_token_ids)[:, None]
    return logits.double().log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def largest_difference(model: PreTrainedModel, generations: list[Generation], *, temperature: float = 1.0) -> float:
    return max(
        abs(ours - theirs)
        for generation in generations
        for ours, theirs in zip(generation.engine_logprobs, reference_logprobs(model, generation, temperature=temperature), strict=True)
    )


def checkpoint_tensors(model: PreTrainedModel, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors as transformers writes them to disk: one per expert, Hugging Face names."""
    model.save_pretrained(folder)
    for file in sorted(folder.glob("*.safetensors")):
        yield from load_file(file).items()
