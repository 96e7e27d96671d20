"""From a YAML file and key=value overrides to a RunConfig, and back; every mistake becomes one line that names file, key and remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megatron_minpro.config.run_config import RunConfig
from megatron_minpro.config.settings import ConfigError, Settings, escape
from megatron_minpro.config.shipped import find_config
from megatron_minpro.config.yaml_text import render_yaml

__all__ = ["ConfigError", "dump_config", "flatten_differences", "load_config"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or a shipped one by its name), apply key=value overrides from left to right, validate.

    Values of overrides are YAML. A top-level section may be the path of a .yaml file that holds it (objective=configs/objective/grpo.yaml).
    ${NAME} in a string is an environment variable. All paths are relative to the working directory.
    Raises ConfigError, one line: which file and line (or the command line), which key, its value, what was expected.
    """
    path = find_config(path)
    settings = Settings()
    settings.read_file(path)
    for assignment in overrides:
        settings.override(assignment)
    try:
        return RunConfig.model_validate(settings.values)
    except ValidationError as error:
        raise ConfigError(_explain(error, settings, path)) from None


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, defaults included; load_config reads it back as an equal one."""
    return render_yaml(escape(config.model_dump(mode="json")))


def flatten_differences(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in a, value in b) for every key that differs; a key that one side lacks counts as None there."""
    flat_a, flat_b = (dict(_flatten(config.model_dump(mode="json"), "")) for config in (a, b))
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    return {key: (flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)}


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):  # an empty one says nothing that its keys would not
        for key, child in value.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _explain(error: ValidationError, settings: Settings, path: Path) -> str:
    # A misspelt key is also a missing key; the misspelling is what helps.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    text = _explain_one(problems[0], settings, path)
    if len(problems) > 1:
        others = ", ".join(_dotted(problem["loc"]) for problem in problems[1:4])
        text += f" (and {len(problems) - 1} more: {others}{', ...' if len(problems) > 4 else ''})"
    return text


def _explain_one(problem: ErrorDetails, settings: Settings, path: Path) -> str:
    loc = problem["loc"]
    key = _dotted(loc)
    origin = settings.origin(loc, otherwise=str(path))
    if problem["type"] == "extra_forbidden":
        nearest = _nearest_key(key)
        return f"{origin}: unknown key {key}; {f'did you mean {nearest}?' if nearest else 'no known key is near it'}"
    if problem["type"] == "missing":
        return f"{settings.origin(loc[:-1], otherwise=str(path))}: missing key {key}: {_description(loc)}"
    message = problem["msg"]
    if problem["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        message = message.removeprefix(f"{key}.")
        subject, equals, _ = message.partition(" = ")
        if equals and " " not in subject:  # our own checks begin with "key = value", relative to their section
            origin = settings.origin((*loc, *subject.split(".")), otherwise=str(path))
            return f"{origin}: {f'{key}.' if key else ''}{message}"
        return f"{settings.sources(loc, otherwise=str(path))}: {f'{key}: ' if key else ''}{message}"
    if problem["type"] in ("model_type", "dict_type") or "dictionary" in message:
        file = " or the path of a .yaml file with them" if len(loc) == 1 else ""
        return f"{origin}: {key} = {problem['input']!r}: expected a section, key: value lines{file}"
    expectation = message.removeprefix("Input should be ").removeprefix("String should ").removeprefix("List should ")
    return f"{origin}: {key} = {problem['input']!r}: expected {expectation}"


def _dotted(loc: tuple[str | int, ...]) -> str:
    return ".".join(map(str, loc))


def _descriptions() -> dict[str, str]:
    """Dotted key -> what it means, for every key that RunConfig knows."""
    return dict(_walk(RunConfig, ""))


def _description(loc: tuple[str | int, ...]) -> str:
    """Of the key, or of the nearest key above it (the second of two betas is no key of its own)."""
    known = _descriptions()
    return next((known[_dotted(loc[:end])] for end in range(len(loc), 0, -1) if _dotted(loc[:end]) in known), "required")


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        yield dotted, field.description or ""
        for candidate in (field.annotation, *_union_members(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                yield from _walk(candidate, f"{dotted}.")


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()


def _nearest_key(key: str) -> str | None:
    """The known key nearest to a wrong one: a misspelling in the same section first, then the right word in the wrong section."""
    known = list(_descriptions())
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    for candidates, wanted, cutoff in (
        (siblings, leaf, 0.8),
        ({name.rpartition(".")[2]: name for name in reversed(known)}, leaf, 0.8),
        (siblings, leaf, 0.5),
        ({name: name for name in known}, key, 0.6),
    ):
        found = difflib.get_close_matches(wanted, candidates, n=1, cutoff=cutoff)
        if found:
            return candidates[found[0]]
    return None
