"""Where a model's sizes come from when its weights are elsewhere: a config.json, or the data in configs/models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints_convert.nearest_name import nearest
from parallel.planner.shape import ModelShape, from_config
from parallel.shipped import shipped_folder

FOLDER = shipped_folder("models")

_VARIANT = re.compile(r"[-_](base|instruct|thinking|instruct-2507|thinking-2507)$")


def known_models() -> list[str]:
    """Names of the files in configs/models."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


class FoundConfig(NamedTuple):
    """A model's configuration in the words of a Hugging Face config.json, what the model is called, and where that was read."""

    values: Mapping[str, Any]
    name: str
    source: str | Path


def read_config(path: Path) -> FoundConfig:
    """From a config.json, or from the folder that holds it. Raises ValueError naming the file and what is wrong with it."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); expected a Hugging Face config.json or a folder with one") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: holds a JSON {type(config).__name__}, expected an object")
    return FoundConfig(config, path.name if path.is_dir() else path.stem, file)


def find_config(path: str, *, architecture: Mapping[str, Any] | None) -> FoundConfig:
    """The model at `path`: its own config.json, else the recipe it would be made by, else the data shipped under its name.

    The name is the last part of the path without -Base and the like. Raises ValueError saying what was looked for.
    """
    folder = Path(path)
    if folder.exists():
        return read_config(folder)
    if architecture is not None:
        # A tokenizer that is yet to be made decides the vocabulary.
        return FoundConfig({"vocab_size": 64, **architecture}, folder.name, "model.warm_up.architecture")
    name = _VARIANT.sub("", folder.name.lower()).replace("-", "_")
    if name in known_models():
        return read_config(FOLDER / f"{name}.json")
    raise ValueError(
        f"model.path: {path} does not exist and no shipped sizes are called {name}; {nearest(name, known_models())}; "
        "expected one of them, a Hugging Face folder, or --model-config CONFIG.json"
    )


def read_shape(path: Path) -> ModelShape:
    """The sizes in a config.json, or in the folder that holds it. Raises ValueError naming the file and what is wrong with it."""
    found = read_config(path)
    return from_config(found.values, name=found.name, source=found.source)


def find_shape(path: str, *, architecture: Mapping[str, Any] | None) -> ModelShape:
    """The sizes of the model at `path`; see `find_config`."""
    found = find_config(path, architecture=architecture)
    return from_config(found.values, name=found.name, source=found.source)
