"""One context-parallel rank of the scan benchmark; rank 0 writes what was measured.

torchrun --nproc-per-node CP scan_process.py RESULT.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.prefix_scan import PrefixMin, scan
from parallel.sequence_shard import SequenceShard

LENGTHS = [32_768] * 8
_REPEATS = 40


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, cp_size = dist.get_rank(), dist.get_world_size()
    shard, whole = SequenceShard.zigzag(LENGTHS, rank, cp_size, dist.group.WORLD), SequenceShard.whole(LENGTHS)
    x_T = whole.local([torch.randn(length) for length in LENGTHS], fill=0.0)
    mask_T = torch.rand(len(x_T)) < 0.9
    # Where each token of each rank lies in the whole, and back.
    shards = [SequenceShard.zigzag(LENGTHS, r, cp_size, None) for r in range(cp_size)]
    places = [whole.chunk_starts[one.sequence_id_T] + one.position_T for one in shards]
    here, back = places[rank], torch.cat(places).argsort()
    local_x_T, local_mask_T, all_T = x_T[here], mask_T[here], torch.ones_like(mask_T)
    identity_T = local_x_T.where(local_mask_T, torch.inf)

    def ours() -> Tensor:
        return scan(shard, [PrefixMin(local_x_T, local_mask_T)])[0]

    def gathering() -> Tensor:
        """Every token's value to every rank; masked ones hold the identity already, so that no mask need travel."""
        gathered = identity_T.new_empty(cp_size * len(identity_T))
        dist.all_gather_into_tensor(gathered, identity_T)
        return scan(whole, [PrefixMin(gathered.index_select(0, back), all_T)])[0].index_select(0, here)

    def alone() -> Tensor:
        return scan(whole, [PrefixMin(x_T, mask_T)])[0]

    assert torch.equal(ours(), gathering()) and torch.equal(ours(), alone()[here])
    bytes_ours, bytes_gathering = sent_bytes(ours), sent_bytes(gathering)
    times: dict[str, list[float]] = {"ours": [], "gathering": []}
    for _ in range(_REPEATS):
        for name, function in (("ours", ours), ("gathering", gathering)):
            dist.barrier()
            times[name].append(seconds(function))
    if rank == 0:
        times["alone"] = [seconds(alone) for _ in range(_REPEATS)]
        result = {name: statistics.median(each) for name, each in times.items()}
        Path(sys.argv[1]).write_text(json.dumps(result | {"bytes_ours": bytes_ours, "bytes_gathering": bytes_gathering}))
    dist.barrier()
    dist.destroy_process_group()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sent_bytes(function: Callable[[], object]) -> int:
    """What this rank hands to all others in the all-gathers that `function` enters: its part, once for each of them."""
    original, sent = dist.all_gather_into_tensor, 0

    def counted(output: Tensor, part: Tensor, *args: object, **options: object) -> object:
        nonlocal sent
        sent += part.numel() * part.element_size() * (dist.get_world_size() - 1)
        return original(output, part, *args, **options)  # type: ignore[arg-type]

    dist.all_gather_into_tensor = counted
    try:
        function()
    finally:
        dist.all_gather_into_tensor = original
    return sent


if __name__ == "__main__":
    main()
