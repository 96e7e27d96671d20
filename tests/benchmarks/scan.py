"""The prefix scan: against one pass of torch.cummin on one rank, and over context-parallel ranks against gathering every token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from actor import least_seconds
from rows import Row

from parallel.prefix_scan import PrefixMin, scan
from parallel.sequence_shard import SequenceShard

_ROOT = Path(__file__).resolve().parents[2]


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    return [
        scan_against_cummin("8 sequences of 32,768 tokens", [32_768] * 8),
        scan_against_cummin("64 sequences of 1 to 8,191 tokens", [1 + (7919 * i) % 8191 for i in range(64)]),
        *scan_over_ranks(2, folder),
        *scan_over_ranks(4, folder),
    ]


def scan_against_cummin(name: str, lengths: list[int]) -> Row:
    """The exclusive prefix minimum of packed sequences against one torch.cummin over the same numbers, which neither restarts nor masks.

    The least CPU seconds of each, in turns: others on the machine do not show.

    The C library gives small buffers back to the kernel after every call, and fetches them page by page for the next, until a larger
    one has been freed. Any trainer frees larger ones than the 16 MB here; without, both sides would measure the kernel.
    """
    torch.ones(4 << 20)
    shard = SequenceShard.whole(lengths)
    x_T = torch.randn(shard.num_local_tokens)
    mask_T = torch.rand(shard.num_local_tokens) < 0.9
    ways = {"ours": lambda: scan(shard, [PrefixMin(x_T, mask_T)]), "cummin": lambda: torch.cummin(x_T, 0)}
    found = least_seconds(ways, rounds=100)
    return Row(
        name=f"prefix-min scan, one rank, {name}",
        seconds=found["ours"],
        peer="torch.cummin",
        peer_seconds=found["cummin"],
        target=3.0,
    )


def scan_over_ranks(cp_size: int, folder: Path) -> list[Row]:
    """The scan over gloo processes: bytes sent by a rank and seconds, against gathering all tokens, and seconds against one rank."""
    result = folder / f"scan_cp{cp_size}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cp_size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("scan_process.py")), str(result)], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"scan_process.py on {cp_size} ranks failed:\n{done.stderr[-3000:]}")
    measured = json.loads(result.read_text())
    result.unlink()
    name = f"prefix-min scan, cp {cp_size}, 8 sequences of 32,768 tokens"
    return [
        Row(
            name=name,
            seconds=measured["ours"],
            peer="gathering every token, scanning all on each rank",
            peer_seconds=measured["gathering"],
            target=1.0,
            own_bytes=measured["bytes_ours"],
            peer_bytes=measured["bytes_gathering"],
            bytes_target=0.01,
        ),
        Row(name=name, seconds=measured["ours"], peer="the scan on one rank, all tokens", peer_seconds=measured["alone"], target=None),
    ]
