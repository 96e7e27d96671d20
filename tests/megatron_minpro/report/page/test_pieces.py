from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_minpro.report.page.pieces import PieceTable, find_tokenizer, split_text


def test_a_character_of_three_bytes_stands_at_its_last_token(byte_tokenizer: Callable[..., Path]) -> None:
    tokenizer = find_tokenizer([byte_tokenizer()])
    ids = list("a世é".encode())
    assert split_text(ids, tokenizer) == ["a", None, None, "世", None, "é"]


def test_special_tokens_have_a_text_and_a_mark(byte_tokenizer: Callable[..., Path]) -> None:
    table = PieceTable(find_tokenizer([byte_tokenizer("<|end|>")]))
    assert table.indices(np.array([*b"hi", 256, *b"h"])).tolist() == [0, 1, 2, 0]
    assert table.listed() == [[104, "h", 0], [105, "i", 0], [256, "<|end|>", 1]]


def test_controls_in_a_token_are_visible(byte_tokenizer: Callable[..., Path]) -> None:
    table = PieceTable(find_tokenizer([byte_tokenizer("\u202e" * 1000)]))
    table.indices(np.array([0x1B, 256]))
    escape, override = table.listed()
    assert escape == [0x1B, "␛", 0]
    assert override[1] == "⟨RLO⟩" * 200 + "… (800 more characters)"


def test_without_a_tokenizer_ids_stand_for_texts(tmp_path: Path) -> None:
    assert find_tokenizer([tmp_path]) is None
    assert split_text([7, 12], None) == ["7 ", "12 "]


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        find_tokenizer([tmp_path])
