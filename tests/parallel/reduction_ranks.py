"""Run by rank_pool.py from test_reduction.py: two gloo ranks add up metrics; each keeps what it saw.

Argument: the directory that holds input and output.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.reduction import MetricSum

CPU = torch.device("cpu")


def metrics(rank: int) -> dict[str, torch.Tensor]:
    """Values whose sum shows in fp64 alone; names in another order on each rank."""
    values = {
        "loss": torch.tensor(1.0 + rank),
        "ratio": torch.tensor([2.0**24 if rank else 1.0, 10.0 * rank]),
        "bins": torch.arange(6).view(2, 3),
    }
    return dict(reversed(values.items())) if rank else values


def main() -> None:
    directory = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank, control = dist.get_rank(), dist.group.WORLD
    assert control is not None
    both = MetricSum(source_rank=1, control_group=control, device=CPU)
    seen: dict[str, object] = {"both": both(metrics(rank)), "again": both({name: 2 * value for name, value in metrics(rank).items()})}
    one = MetricSum(source_rank=1, control_group=control, device=CPU)
    seen["one"] = one(metrics(1) if rank == 1 else None)

    # Refused before any collective, so that no rank waits for another.
    refusals = {}
    for what, changed in (
        ("name", {**metrics(rank), "extra": torch.zeros(1)}),
        ("missing", {"loss": torch.tensor(1.0)}),
        ("shape", {**metrics(rank), "loss": torch.zeros(2)}),
    ):
        try:
            both(changed)
        except ValueError as error:
            refusals[what] = str(error)
    seen["refusals"] = refusals
    torch.save(seen, directory / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
