"""The prefix scan against one pass of torch.cummin."""

from __future__ import annotations

from pathlib import Path

import torch
from rows import Row, median_seconds

from parallel.prefix_scan import PrefixMin, scan
from parallel.sequence_shard import SequenceShard


def rows(folder: Path) -> list[Row]:
    """All rows of this file. folder: an existing folder for scratch files."""
    return [scan_against_cummin()]


def scan_against_cummin() -> Row:
    """The exclusive prefix minimum of 8 packed sequences of 32,768 tokens against one torch.cummin over the same numbers."""
    shard = SequenceShard.whole([32_768] * 8)
    x_T = torch.randn(shard.num_local_tokens)
    mask_T = torch.rand(shard.num_local_tokens) < 0.9
    return Row(
        name="local prefix-min scan, 262,144 tokens",
        seconds=median_seconds(lambda: scan(shard, [PrefixMin(x_T, mask_T)]), repeats=30),
        peer="torch.cummin",
        peer_seconds=median_seconds(lambda: torch.cummin(x_T, 0), repeats=30),
        target=3.0,
    )
