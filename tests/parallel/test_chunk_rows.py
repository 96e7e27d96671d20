"""Rows of one length for chunks of unequal length, by hand and by property."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parallel.chunk_rows import chunk_rows


def test_by_hand() -> None:
    rows = chunk_rows([5, 1, 3], device=None)
    assert rows.row_length == 3
    assert rows.token_of_slot.view(-1, 3).tolist() == [[0, 1, 2], [3, 4, 9], [5, 9, 9], [6, 7, 8]]
    assert rows.chunk_of_row.tolist() == [0, 0, 1, 2] and rows.last_row_of_chunk.tolist() == [1, 2, 3]
    assert rows.previous_slot_T.tolist() == [12, 0, 1, 2, 3, 12, 12, 9, 10]


@given(st.lists(st.one_of(st.integers(1, 9), st.integers(500, 1200)), min_size=1, max_size=12))
def test_every_token_has_one_slot_and_slots_stay_within_twice_the_tokens(lengths: list[int]) -> None:
    rows = chunk_rows(lengths, device=None)
    total = sum(lengths)
    assert sorted(t for t in rows.token_of_slot.tolist() if t < total) == list(range(total))
    assert len(rows.token_of_slot) < 2 * total + len(lengths)
