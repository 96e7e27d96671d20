"""The small files of a Hugging Face folder that travel with its weights: tokenizer, generation settings, chat template."""

from __future__ import annotations

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
    """Tokenizer and generation files of a model folder, name -> content."""
    return {name: (folder / name).read_bytes() for name in COMPANION_FILES if (folder / name).is_file()}
