"""How the tokens of one rank are folded into rows, so that a scan that restarts at every chunk runs over all rows at once.

Rows are cut from the token axis wherever they fall. Up to the first chunk that starts in mid-row, a row belongs to one chunk and is
scanned as a whole; the tokens from there to the row's end are *late*. What couples the rows is the *skeleton*: for each row, in order, one
summary of its tokens before the late ones, then its late tokens one by one. It is short where chunks are long, so the slower scan, which
can restart, visits little.

Shapes: N chunks, R rows of L tokens (the last may be filled up), K items of the skeleton, D late tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HIGHEST_GROUP = 1 << 30  # keys near (1 << 30) << 32 are normal float64 numbers, which no flush to zero touches
# With fewer tokens per chunk than this, most would be late or rows too many: a skeleton of all tokens is then the fastest.
_SHORTEST_MEAN_CHUNK = 400

_ROW_TENSORS = ("token_K", "summary_R", "summary_token_R", "before_R", "continues_R", "late_D", "late_token_D")


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenRows:
    """Built by `fold_tokens`. Index tensors are int64 and on the device of the tokens."""

    num_rows: int  # R
    row_length: int  # L; 1 where chunks are short: items are then the tokens, and the tensors after item_starts are empty
    key_K: Tensor  # the item's chunk, counted from the end, in the upper 32 bits: falls from chunk to chunk by more than any int32
    item_starts: Tensor  # [N + 1] first item of every chunk, then K
    token_K: Tensor  # the last token that a summary covers; a late token itself
    summary_R: Tensor  # which item is the row's summary
    summary_token_R: Tensor  # token_K of this item
    before_R: Tensor  # the item before the row's first; 0 for the first row
    continues_R: Tensor  # bool: the item before the row's first belongs to the same chunk
    late_D: Tensor  # which items are late tokens
    late_token_D: Tensor  # token_K of these items


def fold_tokens(chunk_lengths: Tensor, device: torch.device) -> TokenRows:
    """Plan the rows for chunks of these lengths, int64 [N] on the host, each at least 1. Waits for no device; linear in N + R + K."""
    num_tokens = int(chunk_lengths.sum())
    mean_length = num_tokens / len(chunk_lengths)
    starts = torch.cat([chunk_lengths.new_zeros(1), chunk_lengths.cumsum(0)])
    if mean_length < _SHORTEST_MEAN_CHUNK:
        length, planned = 1, dict.fromkeys(_ROW_TENSORS, starts[:0]) | {"item_starts": starts}
    else:
        # A row costs as much as about 50 tokens of it, and a chunk makes half a row of tokens late: the sum is least near this root.
        length = 1 << round(math.log2(math.sqrt(40 * mean_length)))
        planned = _plan_rows(starts, num_tokens, length)
    chunk_of_K = torch.arange(len(chunk_lengths)).repeat_interleave(planned["item_starts"].diff())
    planned["key_K"] = (_HIGHEST_GROUP - chunk_of_K) << 32
    return TokenRows(
        num_rows=-(-num_tokens // length), row_length=length, **{name: x.to(device, non_blocking=True) for name, x in planned.items()}
    )


def _plan_rows(starts: Tensor, num_tokens: int, length: int) -> dict[str, Tensor]:
    row_start_R = torch.arange(0, num_tokens, length)
    row_end_R = (row_start_R + length).clamp(max=num_tokens)
    inner = starts[:-1][starts[:-1] % length != 0]
    split_R = row_end_R.scatter_reduce(0, inner // length, inner, "amin")  # the first late token, or the row's end
    width_R = 1 + row_end_R - split_R
    summary_R = width_R.cumsum(0) - width_R
    token_K = torch.arange(int(width_R.sum())) + (split_R - 1 - summary_R).repeat_interleave(width_R)
    late_D = torch.ones_like(token_K).index_fill_(0, summary_R, 0).nonzero()[:, 0]
    return {
        "item_starts": torch.searchsorted(token_K, starts),
        "token_K": token_K,
        "summary_R": summary_R,
        "summary_token_R": split_R - 1,
        "before_R": (summary_R - 1).clamp(min=0),
        "continues_R": ~torch.isin(row_start_R, starts),
        "late_D": late_D,
        "late_token_D": token_K[late_D],
    }
