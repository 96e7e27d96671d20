"""Run by rank_pool.py from test_prefix_scan.py: four gloo ranks scan at cp 2 and cp 4 and keep answers and collectives.

Argument: the directory that holds input and output.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.prefix_scan import PrefixDecayedSum, PrefixMin, PrefixMoment, PrefixSum, SequenceSum, scan
from parallel.sequence_shard import SequenceShard

COLLECTIVES = ("all_gather_into_tensor", "all_reduce", "all_gather", "broadcast", "reduce_scatter_tensor", "all_to_all_single", "barrier")


def main() -> None:
    directory = Path(sys.argv[1])
    given = torch.load(directory / "input.pt", weights_only=True)
    dist.init_process_group("gloo")
    groups = {2: dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])[0], 4: dist.group.WORLD}
    entered: list[str] = []
    sent: list[int] = []
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            entered.append(_name)
            sent.append(args[1].numel() if _name == "all_gather_into_tensor" else 0)
            return _original(*args, **kwargs)

        setattr(dist, name, counted)

    for cp_size, group in groups.items():
        shard = SequenceShard.zigzag(given["lengths"], dist.get_rank(group), cp_size, group)
        x_T, mask_T = shard.local(given["xs"], fill=float("nan")).requires_grad_(), shard.local(given["masks"], fill=False)
        entered.clear()
        sent.clear()
        sums = [PrefixSum(x_T, mask_T), PrefixSum(x_T, mask_T, exclusive=True)]
        prefix = [PrefixMin(x_T, mask_T), *sums, PrefixMoment(x_T, mask_T), PrefixDecayedSum(x_T, mask_T, decay=0.9)]
        answers = scan(shard, [*prefix, SequenceSum(x_T, mask_T)])
        result = {"collectives_of_scan": list(entered), "numbers_sent": sum(sent), "trained_tokens": int(mask_T.sum())}
        entered.clear()
        (x_T * sum(answers[:5]) * shard.per_token(sum(answers[5:])))[mask_T].sum().backward()
        result["collectives_of_backward"] = list(entered)
        x_T = x_T.detach()
        result["answers"] = [*(shard.assemble(answer) for answer in answers[:5]), *(list(answer) for answer in answers[5:])]
        for whole, again in zip(given["masks"], shard.assemble(mask_T), strict=True):
            assert torch.equal(whole, again), "assemble must keep booleans"
        torch.save(result, directory / f"cp{cp_size}_rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
