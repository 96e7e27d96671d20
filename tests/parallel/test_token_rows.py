"""The fold of tokens into rows and a skeleton: what each item must cover."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.token_rows import fold_tokens


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1000, 5000), st.sampled_from([256, 512, 2048])), min_size=1, max_size=8))
def test_items_cover_all_tokens_in_order_each_inside_one_chunk_and_one_row(lengths: list[int]) -> None:
    chunk_of = [chunk for chunk, length in enumerate(lengths) for _ in range(length)]
    rows = fold_tokens(torch.tensor(lengths), torch.device("cpu"))
    assert rows.num_rows == -(-len(chunk_of) // rows.row_length)
    last = rows.token_K.tolist() if rows.row_length > 1 else list(range(len(chunk_of)))
    late, summaries = set(rows.late_D.tolist()), dict(zip(rows.summary_R.tolist(), range(rows.num_rows), strict=False))
    first, starts, keys = 0, [], []
    for item, token in enumerate(last):
        assert first <= token and chunk_of[first] == chunk_of[token], "an item covers tokens of one chunk"
        assert first // rows.row_length == token // rows.row_length, "and of one row"
        if item in summaries:
            assert first == summaries[item] * rows.row_length, "a summary starts where its row does"
            assert bool(rows.continues_R[summaries[item]]) == (first > 0 and chunk_of[first - 1] == chunk_of[first])
        else:
            assert first == token and (item in late or rows.row_length == 1)
        starts += [item] if first == 0 or chunk_of[first - 1] != chunk_of[first] else []
        keys.append(chunk_of[token])
        first = token + 1
    assert first == len(chunk_of)
    assert rows.item_starts.tolist() == [*starts, len(last)]
    key_K = rows.key_K.tolist()
    assert len(key_K) == len(last)
    assert all((a - b) >> 32 == later - earlier for a, b, earlier, later in zip(key_K, key_K[1:], keys, keys[1:], strict=False))


def test_long_chunks_leave_a_short_skeleton_and_short_chunks_need_no_rows() -> None:
    assert len(fold_tokens(torch.tensor([32_768] * 8), torch.device("cpu")).key_K) == 256
    assert len(fold_tokens(torch.tensor([4000] * 64), torch.device("cpu")).key_K) < 256_000 // 10
    assert fold_tokens(torch.tensor([3] * 100), torch.device("cpu")).row_length == 1
