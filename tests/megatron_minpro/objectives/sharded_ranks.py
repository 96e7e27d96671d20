"""Run by rank_pool.py from test_sharded.py: four gloo ranks run every objective at cp 4 and at cp 2 x dp 2 and keep what came out.

Argument: the directory that holds input and output.
"""

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_minpro.objectives import TokenBatch
from parallel.sequence_shard import SequenceShard
from tests.megatron_minpro.objectives.conftest import local_top
from tests.megatron_minpro.objectives.variants import VARIANTS, make


def main() -> None:
    directory = Path(sys.argv[1])
    case = torch.load(directory / "case.pt", weights_only=True)
    dist.init_process_group("gloo")
    pairs, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    entered: list[str] = []
    for name in ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor"):
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            entered.append(_name)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)

    # At cp 2 the first pair of ranks holds half of the sequences, the second pair the others.
    for cp_size, group, indices in ((4, dist.group.WORLD, [0, 1, 2, 3, 4, 5]), (2, pairs, [[0, 2, 5], [1, 3, 4]][dist.get_rank() // 2])):
        shard = SequenceShard.zigzag([len(case["masks"][i]) for i in indices], dist.get_rank(group), cp_size, group)
        results = {}
        for name, is_centred in [*((name, False) for name in VARIANTS), *((name, True) for name in VARIANTS if make(name).centers_scores)]:
            objective = make(name)
            corrections = shard.local([case["corrections"][i] for i in indices], fill=math.nan)
            batch = TokenBatch(
                logprobs_T=shard.local([case["logprobs"][i] for i in indices], fill=math.nan).requires_grad_(),
                behaviour_logprobs_T=shard.local([case["behaviour"][i] for i in indices], fill=math.nan),
                advantages_T=shard.local([case["advantages"][i] for i in indices], fill=math.nan),
                loss_mask_T=shard.local([case["masks"][i] for i in indices], fill=False),
                shard=shard,
                global_tokens=int(sum(mask.sum() for mask in case["masks"])),
                global_sequences=sum(bool(mask.any()) for mask in case["masks"]),
                behaviour_entropies_T=shard.local([case["entropies"][i] for i in indices], fill=math.nan),
                lag=case["lag"],
                correction_weights_T=None if is_centred else corrections,
                top=local_top(case["top"], indices, shard) if is_centred else None,
            )
            statistics = None
            if objective.needs_minibatch_statistics:
                statistics = objective.minibatch_statistics(batch)
                dist.all_reduce(statistics)
            entered.clear()
            out = objective(batch, statistics)
            gradient_T, *of_top = torch.autograd.grad(out.loss, [batch.logprobs_T, *([batch.top.logprobs_TK] if batch.top else [])])
            collectives = list(entered)
            results[f"{name} centred" if is_centred else name] = {
                "top_gradients": [dict(zip(indices, shard.assemble(x_T), strict=True)) for x_TK in of_top for x_T in x_TK.unbind(1)],
                "loss": out.loss.item(),
                "collectives": collectives,
                "gradients": dict(zip(indices, shard.assemble(gradient_T), strict=True)),
                "weights": dict(zip(indices, shard.assemble(out.weights_T), strict=True)),
                "metrics": out.metrics,
            }
        torch.save(results, directory / f"cp{cp_size}_rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
