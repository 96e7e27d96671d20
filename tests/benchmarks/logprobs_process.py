"""Prints the seconds and the peak memory beyond the inputs, as JSON, of one forward and backward pass of the log-prob head.

python logprobs_process.py chunked|straightforward
"""

from __future__ import annotations

import json
import sys
import time

import torch
from rows import resident_bytes
from torch import Tensor

from parallel.logprobs import token_logprobs


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_logprobs(
        hidden, weight, labels, vocab_size=len(weight), temperature=1.0, tp_group=None, chunk_tokens=32, with_entropy=False
    )[0]


def straightforward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def measure(way: str, tokens: int, hidden_size: int, vocab_size: int) -> dict[str, float]:
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab_size, (tokens,))
    before, start = resident_bytes("VmRSS"), time.perf_counter()
    {"chunked": chunked, "straightforward": straightforward}[way](hidden, weight, labels).sum().backward()
    return {"seconds": time.perf_counter() - start, "bytes": resident_bytes("VmHWM") - before}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    measure(sys.argv[1], 64, 64, 64)  # loads what torch loads late
    print(json.dumps(measure(sys.argv[1], 1024, 256, 18_992)))


if __name__ == "__main__":
    main()
