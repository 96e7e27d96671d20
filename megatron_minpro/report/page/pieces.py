"""The text of each token in its context, from a run's tokenizer.

A character of several bytes may be spread over several tokens: those before the last have no text of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from megatron_minpro.report.page.visible_text import visible

TOKENIZER_FILE = "tokenizer.json"
_LONGEST = 200  # characters of one token


def find_tokenizer(folders: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of the first folder that holds one.

    Raises:
        ValueError: the file is no tokenizer; names it.
    """
    for folder in folders:
        path = folder / TOKENIZER_FILE
        if path.is_file():
            try:
                return Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing narrower
                raise ValueError(f"{path}: cannot be read as a tokenizer ({error})") from error
    return None


def split_text(token_ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str | None]:
    """Text that each token adds to those before it. None: the first bytes of a character that a later token completes.

    Special tokens have a text too. Without a tokenizer the id stands for the text.
    """
    if tokenizer is None:
        return [f"{token_id} " for token_id in token_ids]
    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer, token_id) for token_id in token_ids]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    token_id: int
    text: str | None
    special: bool


class PieceTable:
    """All pieces of a page, each once."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        """tokenizer: None shows ids."""
        self._tokenizer = tokenizer
        added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._index: dict[_Piece, int] = {}

    def __len__(self) -> int:
        return len(self._index)

    def indices(self, token_ids: np.ndarray) -> np.ndarray:
        """[L] int64: the place of each token's piece in the table; new ones are added."""
        listed = token_ids.tolist()
        pieces = (
            _Piece(token_id=token_id, text=text, special=token_id in self._special)
            for token_id, text in zip(listed, split_text(listed, self._tokenizer), strict=True)
        )
        return np.array([self._index.setdefault(piece, len(self._index)) for piece in pieces], dtype=np.int64)

    def listed(self) -> list[list[int | str | None]]:
        """[token id, visible text or null, 1 for a special token or 0] of each piece, in order."""
        return [
            [piece.token_id, None if piece.text is None else visible(piece.text, limit=_LONGEST), int(piece.special)]
            for piece in self._index
        ]
