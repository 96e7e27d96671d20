"""How far one model's next-token distributions are from another's: sums over tokens, so that chunks and prompts add up."""

# Shapes: T positions, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitError:
    """Means and maxima over the positions compared; all logarithms natural. "Next token" is the one that really follows.

    Differences are absolute. kl: of the compared distribution from the reference, per position (Kullback and Leibler, 1951).
    """

    num_positions: int
    num_next_tokens: int  # fewer: nothing follows the last token of a prompt
    reference_nll: float  # mean negative log-probability of the next token
    compared_nll: float
    next_token_mean: float
    next_token_max: float
    vocabulary_mean: float  # over every entry of the vocabulary
    vocabulary_max: float
    kl: float
    top1_agreement: float  # share of positions whose most probable token is the same


class LogitErrorSum:
    """Collects logits chunk by chunk; `result` divides."""

    def __init__(self) -> None:
        self._positions = self._entries = self._next_tokens = self._agreeing = 0
        self._sums = torch.zeros(5, dtype=torch.float64)  # reference nll, compared nll, next-token difference, difference, kl
        self._next_token_max = self._vocabulary_max = 0.0

    def add(self, reference_TV: Tensor, compared_TV: Tensor, next_tokens: Tensor) -> None:
        """Logits of T consecutive positions from both models, and the tokens that follow the first len(next_tokens) <= T of them.

        Any float dtype; computed in float32. Raises ValueError for a logit that is not finite.
        """
        for name, logits_TV in (("reference", reference_TV), ("compared", compared_TV)):
            if not logits_TV.isfinite().all():
                raise ValueError(f"the {name} model's logits hold NaN or infinity; expected finite numbers")
        # float32: near -5, neighbouring bfloat16 numbers differ by 0.03, more than what is measured here.
        reference_TV, compared_TV = reference_TV.float().log_softmax(-1), compared_TV.float().log_softmax(-1)
        difference_TV = (compared_TV - reference_TV).abs()
        self._positions += len(reference_TV)
        self._entries += reference_TV.numel()
        self._agreeing += int((reference_TV.argmax(-1) == compared_TV.argmax(-1)).sum())
        self._vocabulary_max = max(self._vocabulary_max, float(difference_TV.max()))
        picked = (torch.arange(len(next_tokens), device=next_tokens.device), next_tokens)
        if len(next_tokens):
            self._next_tokens += len(next_tokens)
            self._next_token_max = max(self._next_token_max, float(difference_TV[picked].max()))
        kl_T = (reference_TV.exp() * (reference_TV - compared_TV)).sum(-1)
        parts = (-reference_TV[picked], -compared_TV[picked], difference_TV[picked], difference_TV, kl_T)
        self._sums += torch.stack([part.sum(dtype=torch.float64).cpu() for part in parts])

    def result(self) -> LogitError:
        """Raises ValueError when no next token was among what was added."""
        if not self._next_tokens:
            raise ValueError("no next token to compare; expected a prompt of at least two tokens")
        reference_nll, compared_nll, next_token, difference, kl = self._sums.tolist()
        return LogitError(
            num_positions=self._positions,
            num_next_tokens=self._next_tokens,
            reference_nll=reference_nll / self._next_tokens,
            compared_nll=compared_nll / self._next_tokens,
            next_token_mean=next_token / self._next_tokens,
            next_token_max=self._next_token_max,
            vocabulary_mean=difference / self._entries,
            vocabulary_max=self._vocabulary_max,
            kl=kl / self._positions,
            top1_agreement=self._agreeing / self._positions,
        )
