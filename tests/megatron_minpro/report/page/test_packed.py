from __future__ import annotations

import base64
import struct

import numpy as np

from megatron_minpro.report.page.packed import pack, pack_indices


def test_numbers_are_little_endian_float32_in_base64() -> None:
    values = [1.5, -0.1, 3e-7]
    assert base64.b64decode(pack(np.array(values, dtype=">f4"))) == struct.pack("<3f", *values)


def test_an_index_takes_two_bytes_where_the_table_allows_it() -> None:
    indices = np.array([0, 65535])
    assert base64.b64decode(pack_indices(indices, table_size=65536)) == struct.pack("<2H", 0, 65535)
    assert base64.b64decode(pack_indices(indices, table_size=65537)) == struct.pack("<2I", 0, 65535)
