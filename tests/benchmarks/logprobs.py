"""The vocab-parallel log-prob head: time against the matrix products that it must do, memory against the straightforward way."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rows import Row

from parallel.logprobs import token_logprobs

_ROOT = Path(__file__).resolve().parents[2]
CHUNKS = (32, 64, 128, 256, 512, 1024)  # 1,024 is all tokens


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    return [*logprobs_against_products(), *chunks_against_straightforward()]


def logprobs_against_products() -> list[Row]:
    """Forward and backward, without and with entropy, against the four bare products.

    Scale: of 8,192 tokens x 2,048 x 151,936 a 16th of the tokens and an 8th of the vocabulary, because the full size takes minutes and 8
    GB. The hidden size is kept: it sets how much arithmetic stands behind each logit.
    """
    tokens, hidden_size, vocab_size = 512, 2048, 18_992
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size).mul_(hidden_size**-0.5).requires_grad_()
    labels = torch.randint(0, vocab_size, (tokens,))
    grad = torch.randn(tokens, vocab_size)

    def head(with_entropy: bool) -> None:
        logprobs, _ = token_logprobs(
            hidden, weight, labels, vocab_size=vocab_size, temperature=1.0, tp_group=None, chunk_tokens=256, with_entropy=with_entropy
        )
        torch.autograd.grad(logprobs.sum(), (hidden, weight))

    def products() -> None:
        with torch.no_grad():
            hidden @ weight.T
            hidden @ weight.T
            grad @ weight
            grad.T @ hidden

    # In turns, so that a change in the machine's load meets all three alike. The first round warms up.
    ways = (products, lambda: head(False), lambda: head(True))
    rounds = [[seconds(way) for way in ways] for _ in range(5)][1:]
    peer_seconds, plain, with_entropy = (statistics.median(times) for times in zip(*rounds, strict=True))
    return [
        Row(
            name=f"log-prob head{end}, {tokens:,} x {hidden_size:,} x {vocab_size:,}, forward and backward",
            seconds=own_seconds,
            peer="its four matrix products",
            peer_seconds=peer_seconds,
            target=1.25,
        )
        for end, own_seconds in (("", plain), (" and entropy", with_entropy))
    ]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def chunks_against_straightforward() -> list[Row]:
    """CPU seconds and peak memory of forward and backward beyond their inputs over chunk sizes, each in a process of its own, gradients
    included on both sides.

    Scale: an 8th of 8,192 tokens, of hidden size 2,048, of 151,936 entries and of chunks of 256 to 8,192 tokens, so that the logits keep
    their proportion to the weight and its gradient. In time, four products stand against three. The least of four runs each: at random the
    library of matrix products takes 16 or 32 MB for itself, which do not grow with the problem and would count 64-fold at this scale.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    program = str(Path(__file__).with_name("logprobs_process.py"))

    def measured(way: str) -> tuple[float, int]:
        runs = []
        for _ in range(4):
            done = subprocess.run([sys.executable, program, way], env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"logprobs_process.py {way} failed:\n{done.stderr[-3000:]}")
            runs.append(json.loads(done.stdout))
        return min(run["seconds"] for run in runs), int(min(run["bytes"] for run in runs))

    peer_seconds, peer_bytes = measured("straightforward")
    found = []
    for chunk_tokens in CHUNKS:
        own_seconds, own_bytes = measured(str(chunk_tokens))
        found.append(
            Row(
                name=f"log-prob head, 1,024 x 256 x 18,992 in chunks of {chunk_tokens}; bytes: peak beyond the inputs",
                seconds=own_seconds,
                peer="logits, log_softmax, gather and autograd",
                peer_seconds=peer_seconds,
                target=None,
                own_bytes=own_bytes,
                peer_bytes=peer_bytes,
                bytes_target=1 / 8 if chunk_tokens == min(CHUNKS) else None,
            )
        )
    return found
