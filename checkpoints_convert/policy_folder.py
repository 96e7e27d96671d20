"""A policy as a Hugging Face folder: weights streamed from the actor, config in both spellings, tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.companions import companion_files
from checkpoints_convert.hf_config import Architecture, config_with_both_spellings, read_config
from checkpoints_convert.mapping import hf_shapes
from checkpoints_convert.safetensors_io import write_checkpoint

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_PLAIN_CLASS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the names that transformers 4 and 5 give it

MAX_SHARD_BYTES = 4_000_000_000


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer of a model folder. Raises ValueError when there is none, or none with an end-of-sequence token."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{folder}: holds no tokenizer ({_TOKENIZER_FILES[0]}); expected it beside the model's config.json")
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise many types, and Exception itself
        raise ValueError(
            f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: the tokenizer has no end-of-sequence token")
    return tokenizer


def _tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer; or what it would choose, where the folder names the plain class: AutoTokenizer imports the models for 1.3 s."""
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if settings.get("tokenizer_class") in _PLAIN_CLASS and "auto_map" not in settings:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def write_policy(
    destination: Path,
    tensors: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    config: Mapping[str, object],
    companions: Mapping[str, bytes],
    replace: bool,
) -> None:
    """Write a folder that transformers and SGLang load. tensors: Hugging Face names, each once, any order. Atomic.

    config: config.json's content; its dtype is set to `dtype`. Raises ValueError for tensors that do not fit the architecture.
    """
    name = str(dtype).removeprefix("torch.")
    content = config_with_both_spellings({**config, "torch_dtype": name, "dtype": name})
    destination.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        destination,
        tensors,
        specs=[(name, shape, dtype) for name, shape in hf_shapes(architecture).items()],
        max_shard_bytes=MAX_SHARD_BYTES,
        extra_files={**companions, "config.json": (json.dumps(content, indent=2) + "\n").encode()},
        replace=replace,
    )


def export_policy(
    destination: Path,
    tensors: Iterator[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    like: Path,
    replace: bool,
    extra_files: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write trained weights beside the config and tokenizer of the model folder `like` that training started from, and `extra_files`."""
    config = read_config(like)
    architecture = Architecture.from_config(config, source=like / "config.json")
    companions = {**companion_files(like), **extra_files}
    write_policy(destination, tensors, architecture, dtype=dtype, config=config, companions=companions, replace=replace)
