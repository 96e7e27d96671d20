"""Prints the seconds and the peak memory beyond the inputs, as JSON, of one forward and backward pass of the log-prob head.

python logprobs_process.py straightforward
python logprobs_process.py 32                     in chunks of 32 tokens
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable

import torch
from rows import resident_bytes
from torch import Tensor

from parallel.logprobs import token_logprobs

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int) -> Tensor:
    return token_logprobs(
        hidden, weight, labels, vocab_size=len(weight), temperature=1.0, tp_group=None, chunk_tokens=chunk_tokens, with_entropy=False
    )[0]


def straightforward(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def measure(way: Way, tokens: int, hidden_size: int, vocab_size: int) -> dict[str, float]:
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab_size, (tokens,))
    before, start = resident_bytes("VmRSS"), time.process_time()
    way(hidden, weight, labels).sum().backward()
    return {"seconds": time.process_time() - start, "bytes": resident_bytes("VmHWM") - before}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    asked = sys.argv[1]
    way: Way = straightforward if asked == "straightforward" else functools.partial(chunked, chunk_tokens=int(asked))
    measure(way, 64, 64, 64)  # loads what torch loads late
    print(json.dumps(measure(way, 1024, 256, 18_992)))


if __name__ == "__main__":
    main()
