"""A size in bytes as people write it on the command line."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size as transformers writes it: 4GB (10^9), 500MB, 2GiB (2^30), or a number. Raises ValueError."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"--shard-size {text!r}: expected a number of bytes, such as 4GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2]]
