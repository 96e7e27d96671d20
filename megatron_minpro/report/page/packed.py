"""Arrays of numbers as base64: a float32 takes 5.3 characters and arrives unchanged, where its digits take about 10."""

from __future__ import annotations

import base64

import numpy as np

CHARACTERS_PER_BYTE = 4 / 3


def pack(array: np.ndarray) -> str:
    """The array's bytes, little-endian, as base64. page.js knows each array's type."""
    return base64.b64encode(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()).decode("ascii")


def pack_indices(indices: np.ndarray, *, table_size: int) -> str:
    """Indices into a table of that size: two bytes each where they suffice, else four."""
    return pack(indices.astype(np.uint16 if table_size <= 1 << 16 else np.uint32))
