"""Run by rank_pool.py from test_logprobs.py: two gloo ranks, each with half of the vocabulary's rows, keep values, gradients, collectives.

Argument: the directory that holds input and output.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.logprobs import token_logprobs

VOCAB = 37


def main() -> None:
    directory = Path(sys.argv[1])
    given = torch.load(directory / "input.pt", weights_only=True)
    dist.init_process_group("gloo")
    rank, group = dist.get_rank(), dist.group.WORLD
    entered: list[str] = []
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast"):
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            entered.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)

    hidden, labels = given["hidden"].requires_grad_(), given["labels"]
    weight = given["weight"].chunk(2)[rank].clone().requires_grad_()
    options = {"temperature": 0.7, "tp_group": group, "chunk_tokens": 5, "with_entropy": True}
    logprobs, entropy = token_logprobs(hidden, weight, labels, vocab_size=VOCAB, **options)
    forward = list(entered)
    entered.clear()
    grad_hidden, grad_weight = torch.autograd.grad((logprobs * given["upstream"]).sum(), (hidden, weight))
    backward = list(entered)

    entered.clear()
    of_several, _ = token_logprobs(hidden, weight, given["labels_of_several"], vocab_size=VOCAB, **options)
    forward_of_several = list(entered)
    entered.clear()
    grads_of_several = torch.autograd.grad((of_several * given["upstream_of_several"]).sum(), (hidden, weight))
    several = {
        "logprobs": of_several.detach(),
        "collectives": {"forward": forward_of_several, "backward": list(entered)},
        **dict(zip(("grad_hidden", "grad_weight"), grads_of_several, strict=True)),
    }

    # A vocabulary of 15 fits into rank 0's 20 rows: rank 1 holds padding alone.
    few = labels % 15
    lopsided, lopsided_entropy = token_logprobs(hidden, weight, few, vocab_size=15, **options)
    (lopsided_grad,) = torch.autograd.grad(lopsided.sum(), hidden)
    alone, alone_entropy = token_logprobs(hidden, given["weight"], few, vocab_size=15, **(options | {"tp_group": None}))
    torch.save(
        {
            "logprobs": logprobs.detach(),
            "entropy": entropy,
            "grad_hidden": grad_hidden,
            "grad_weight": grad_weight,
            "collectives": {"forward": forward, "backward": backward},
            "several": several,
            "lopsided": {
                "logprobs": lopsided.detach(),
                "entropy": lopsided_entropy,
                "alone": alone.detach(),
                "alone_entropy": alone_entropy,
                "finite": bool(lopsided_grad.isfinite().all()),
            },
        },
        directory / f"rank{rank}.pt",
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
