"""Rows of chosen experts: which experts each token of a sequence visits in each layer. A leaf: whoever stores rows needs no Megatron-Core.

Rows of a sequence are [layers, L - 1, k], one row per input of the trainer (a sequence of L tokens is fed as its first L - 1). They are a
set: the order of the k ids has no meaning. A row of MISSING ids alone is a missing row: the router chooses for itself there.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checkpoints_convert.mapping import Architecture

_LARGEST_IN_A_BYTE = 254  # experts; 255 stands for a missing row


def row_dtype(num_experts: int) -> torch.dtype:
    """Of one expert's id: a byte, or two above 254 experts."""
    return torch.uint8 if num_experts <= _LARGEST_IN_A_BYTE else torch.int16


def missing_id(dtype: torch.dtype) -> int:
    """The id that a missing row holds k times."""
    return 255 if dtype == torch.uint8 else -1


def missing_rows(num_layers: int, num_positions: int, experts_per_token: int, *, num_experts: int) -> Tensor:
    """Rows of a sequence of which nothing is known: [layers, positions, k], one number in memory."""
    dtype = row_dtype(num_experts)
    return torch.full((1, 1, 1), missing_id(dtype), dtype=dtype).expand(num_layers, num_positions, experts_per_token)


def is_missing(rows: Tensor) -> Tensor:
    """[..., k] -> bool [...]."""
    return (rows == missing_id(rows.dtype)).all(-1)


def is_wrong(sorted_ids: Tensor, *, num_experts: int) -> Tensor:
    """int64 [..., k], ascending -> bool [...]: an id that is no expert's, or one that stands there twice. Rows of zeros are wrong."""
    outside = (sorted_ids[..., 0] < 0) | (sorted_ids[..., -1] >= num_experts)
    return outside | (sorted_ids.diff(dim=-1) == 0).any(-1)


def check_rows(rows: Tensor, *, num_experts: int, source: str) -> None:
    """Raises ValueError, naming `source` and the first place, for a row that is neither a set of k experts nor missing.

    Args:
        rows: [layers, positions, k] of any integer dtype.
        num_experts: of the model, per layer.
        source: what the rows are of.
    """
    ascending = rows.long().sort(-1).values
    wrong = is_wrong(ascending, num_experts=num_experts)
    if rows.dtype in (torch.uint8, torch.int16):
        wrong &= ~is_missing(rows)
    if wrong.any():
        layer, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{source}: experts {rows[layer, position].tolist()} of layer {layer}, position {position}: expected {rows.size(-1)} different "
            f"ids from 0 to {num_experts - 1} ({int(wrong.sum())} of {wrong.numel()} rows are wrong)"
        )


def rows_of(ids: npt.NDArray[np.int32], *, num_experts: int) -> Tensor:
    """Rows [layers, positions, k] of ids [positions, layers, k], which SGLang returns. Raises ValueError where they are no sets of experts.

    It is made for hundreds of millions of ids: whole columns are compared, nothing is sorted.
    """
    dtype = np.uint8 if row_dtype(num_experts) == torch.uint8 else np.int16
    rows = np.empty((ids.shape[1], ids.shape[0], ids.shape[2]), dtype=dtype)
    np.copyto(rows, ids.transpose(1, 0, 2), casting="unsafe")
    columns = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]).T)
    outside = ids.view(np.uint32).max(initial=0) >= num_experts  # a negative one is a large one
    if outside or any((one == other).any() for one, other in combinations(columns, 2)):
        check_rows(torch.from_numpy(ids.transpose(1, 0, 2).copy()), num_experts=num_experts, source="routed_experts")
    return torch.from_numpy(rows)


def check_shape(rows: Tensor, architecture: Architecture, *, source: str) -> None:
    """Raises ValueError for rows of another model: layers, experts per token, bytes of an id."""
    assert architecture.num_experts is not None and architecture.num_experts_per_tok is not None
    expected = (architecture.num_hidden_layers, architecture.num_experts_per_tok, row_dtype(architecture.num_experts))
    if (rows.size(0), rows.size(2), rows.dtype) != expected:
        raise ValueError(
            f"{source}: experts of {rows.size(0)} layers, {rows.size(2)} a token, {rows.dtype}; expected {expected[0]} layers, "
            f"{expected[1]} a token, {expected[2]}"
        )
