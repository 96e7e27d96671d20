"""The small files of a Hugging Face folder that travel with its weights: tokenizer, generation settings, chat template."""

from __future__ import annotations

import json
from pathlib import Path

# What a served and evaluated model needs beside its weights and config.json; absent ones are skipped.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def companion_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer and generation files of a model folder, name -> content, as transformers 4 and transformers 5 read them."""
    files = {name: (folder / name).read_bytes() for name in COMPANION_FILES if (folder / name).is_file()}
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = readable_by_both(files["tokenizer_config.json"], source=folder / "tokenizer_config.json")
    return files


def readable_by_both(content: bytes, *, source: Path) -> bytes:
    """A tokenizer_config.json in the words that both generations of transformers know; unchanged where it is so already.

    transformers 5 writes the class TokenizersBackend and a list extra_special_tokens. Version 4 knows neither, but both versions read
    PreTrainedTokenizerFast and additional_special_tokens.

    Raises:
        ValueError: not a JSON object, or both lists are there and differ.
    """
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{source}: holds a JSON {type(config).__name__}, expected an object")
    extra = config.get("extra_special_tokens")
    if config.get("tokenizer_class") != "TokenizersBackend" and not isinstance(extra, list):
        return content
    if isinstance(extra, list):
        if config.get("additional_special_tokens", extra) != extra:
            raise ValueError(f"{source}: additional_special_tokens differs from extra_special_tokens; expected one of them")
        config = {("additional_special_tokens" if key == "extra_special_tokens" else key): value for key, value in config.items()}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
