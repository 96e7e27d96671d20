"""The vocab-parallel log-prob head against the matrix products that it must do."""

from __future__ import annotations

from pathlib import Path

import torch
from rows import Row, median_seconds

from parallel.logprobs import token_logprobs


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    return [logprobs_against_products()]


def logprobs_against_products() -> Row:
    """The chunked log-prob head, forward and backward, against the four matrix products that it must do."""
    tokens, hidden_size, vocab_size = 1024, 256, 32_768
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab_size, (tokens,))
    grad = torch.randn(tokens, vocab_size)

    def ours() -> None:
        logprobs, _ = token_logprobs(
            hidden, weight, labels, vocab_size=vocab_size, temperature=1.0, tp_group=None, chunk_tokens=256, with_entropy=False
        )
        logprobs.sum().backward()

    def products() -> None:
        with torch.no_grad():
            hidden @ weight.T
            hidden @ weight.T
            grad @ weight
            grad.T @ hidden

    return Row(
        name=f"log-prob head, {tokens:,} x {hidden_size} x {vocab_size:,}, forward and backward",
        seconds=median_seconds(ours, repeats=5),
        peer="its four matrix products",
        peer_seconds=median_seconds(products, repeats=5),
        target=1.25,
    )
