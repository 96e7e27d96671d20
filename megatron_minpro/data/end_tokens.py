"""Which tokens end a response, and the text of a response without them.

This is the only place that decides where a response ends and that cuts special tokens. Training, the held-out measurement and
`minpro evaluate` all use it, so they grade the same text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.hf_config import read_config
from megatron_minpro.data.chat_template import text_behind_an_answer


def end_token_ids(folder: Path, tokenizer: Any, *, extra: Iterable[str | int] = ()) -> tuple[int, ...]:
    """All tokens that end a response of this model, ascending.

    They are the end-of-sequence tokens of config.json, generation_config.json and the tokenizer, the token that ends an assistant's turn
    in the chat template, and `extra`. Published models disagree in these places: Qwen3's config.json names one token and its
    generation_config.json two; a base model's files name <|endoftext|> while its chat template ends a turn with <|im_end|>.

    Args:
        folder: the model folder, with config.json and perhaps generation_config.json.
        tokenizer: the transformers tokenizer of that folder.
        extra: further tokens, by their text or id.

    Raises:
        ValueError: naming the file or the token, for an id that is not a whole number or outside the vocabulary, and for a text that is
            not exactly one token.
    """
    found = {tokenizer.eos_token_id, end_of_turn_id(tokenizer), *_from_config(folder / "config.json", read_config(folder))}
    generation_config = folder / "generation_config.json"
    if generation_config.is_file():
        found.update(_from_config(generation_config, json.loads(generation_config.read_bytes())))
    found.update(_token_id(tokenizer, token) for token in extra)
    return tuple(sorted(token_id for token_id in found if token_id is not None))


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The special token that the chat template writes right behind an assistant's words; None when it writes none."""
    if tokenizer.chat_template is None:
        return None
    behind = text_behind_an_answer(tokenizer, [], generation_prompt=False).strip()
    token_ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    return token_ids[0] if token_ids and token_ids[0] in _special_tokens(tokenizer) else None


def response_text(tokenizer: Any, token_ids: Sequence[int], *, end_ids: Sequence[int]) -> str:
    """The text of a response as it is graded and shown: without the end token it stopped at, and without any other special token.

    Args:
        tokenizer: the transformers tokenizer of the model.
        token_ids: the response, as sampled.
        end_ids: of `end_token_ids`. An end token that is not a special token is cut at the end of the response only.
    """
    kept = list(token_ids)
    if kept and kept[-1] in end_ids:
        kept.pop()
    return tokenizer.decode(kept, skip_special_tokens=True)


def without_special_tokens(tokenizer: Any, text: str) -> str:
    """What `response_text` gives, from the text of a server that may have left special tokens in it."""
    for token in _special_tokens(tokenizer).values():
        text = text.replace(token, "")
    return text


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    # What the tokenizer leaves out when it decodes: more than the few tokens that all_special_tokens names (Llama 3's <|eot_id|> is one).
    return {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _from_config(path: Path, config: Any) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ValueError(f"{path}: eos_token_id = {value!r}, expected a token id or a list of them")
    return ids


def _token_id(tokenizer: Any, token: str | int) -> int:
    if isinstance(token, int):
        if not 0 <= token < len(tokenizer):
            raise ValueError(f"end_tokens: {token} is not a token id, expected 0 to {len(tokenizer) - 1}")
        return token
    token_ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(token_ids) != 1 or token_ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"end_tokens: {token!r} is {len(token_ids)} tokens of this tokenizer, expected exactly one known token")
    return token_ids[0]
