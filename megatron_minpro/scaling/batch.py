"""Sequences to measure with: made up, all of one length, the same on every rank."""

from __future__ import annotations

import math

import torch

from parallel.token_sequence import TokenSequence
from parallel.top_tokens import even_top_tokens


def synthetic_sequences(
    *, count: int, positions: int, prompt_tokens: int, vocab_size: int, seed: int, top_k: int = 0
) -> list[TokenSequence]:
    """Random tokens; the first prompt_tokens are a prompt, the rest is trained with advantages of both signs.

    positions: logit positions of each, one less than its tokens. behaviour_logprobs lie near a uniform choice: what they are decides
    which tokens the loss clips, not what the step costs. top_k: most likely tokens of each trained one, for score centering; 0: none.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for index in range(count):
        mask = torch.arange(positions) >= prompt_tokens - 1
        behaviour = -math.log(vocab_size) + 0.1 * torch.randn(positions, generator=generator)
        advantage = 1.0 if index % 2 == 0 else -1.0
        sequences.append(
            TokenSequence(
                token_ids=torch.randint(vocab_size, (positions + 1,), generator=generator),
                loss_mask=mask,
                streams={
                    "behaviour_logprobs": torch.where(mask, behaviour, 0.0),
                    "advantages": torch.where(mask, advantage, 0.0),
                },
                top=even_top_tokens(int(mask.sum()), top_k) if top_k else None,
            )
        )
    return sequences
