"""Streamed tensors in groups of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def fill_buckets(tensors: Iterator[tuple[str, Tensor]], *, bucket_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group streamed tensors into buckets of at most `bucket_bytes` (or one larger tensor). Deterministic.

    Within a bucket, wider dtypes come first: laid out end to end, every tensor then starts at a multiple of its item size.
    """
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield sorted(bucket, key=lambda item: -item[1].itemsize)
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield sorted(bucket, key=lambda item: -item[1].itemsize)
