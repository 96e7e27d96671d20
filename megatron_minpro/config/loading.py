"""From a YAML file and key=value overrides to a RunConfig, and back; every mistake becomes one line that names file, key and remedy."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from checkpoints_convert.nearest_name import closest
from megatron_minpro.config.run_config import RunConfig
from megatron_minpro.config.sections import ON_RESUME
from megatron_minpro.config.settings import CHOICES, COMMAND_LINE, ConfigError, Origins, Settings, escape
from megatron_minpro.config.shipped import find_config
from megatron_minpro.config.yaml_text import render_yaml
from megatron_minpro.registry import PlugInError

__all__ = [
    "ConfigError",
    "Placed",
    "changes_numbers",
    "dump_config",
    "explain",
    "flatten",
    "flatten_differences",
    "flatten_settings",
    "load_config",
    "located",
    "may_change_on_resume",
]


class Placed(NamedTuple):
    """An override that was not written on the command line."""

    assignment: str  # key=value
    place: str  # such as "study.yaml:12", for error messages


def load_config(path: str | Path, overrides: Sequence[str | Placed] = ()) -> RunConfig:
    """Read a YAML file, apply key=value overrides from left to right, validate.

    A top-level section may be the path of a .yaml file that holds it (objective=configs/objective/grpo.yaml). ${NAME} in a string is an
    environment variable. All paths are relative to the working directory. Nothing of the user's own runs here:
    `megatron_minpro.run.plug_ins` checks in a second step what names and options lead to.

    Args:
        path: a file, or the name of a shipped configuration.
        overrides: key=value; the value is YAML. Plain text comes from the command line.

    Raises:
        ConfigError: one line says which file and line (or the command line), which key, its value, and what was expected.
    """
    path = find_config(path)
    settings = Settings()
    settings.read_file(path)
    for override in overrides:
        if isinstance(override, str):
            settings.override(override)
        else:
            settings.override(override.assignment, place=override.place)
    try:
        config = RunConfig.model_validate(settings.values)
    except ValidationError as error:
        raise ConfigError(explain(error, settings.origins, path, model=RunConfig)) from None
    config.remember(settings.origins)
    return config


def located(error: PlugInError, config: RunConfig) -> ConfigError:
    """The same error with the file and line, or the command line, that the setting came from.

    Args:
        error: what was found wrong after `config` was read.
        config: the run that holds the setting.
    """
    key = tuple(error.setting.split("."))
    origins = config.origins
    place = origins.origin(key, otherwise="")
    if error.section is not None and place != COMMAND_LINE:
        place = origins.sources(tuple(error.section.split(".")), otherwise="")
    return ConfigError(f"{place}: {error}" if place else str(error))


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML, defaults included; load_config reads it back as an equal one."""
    return render_yaml(escape(config.model_dump(mode="json")))


def flatten(config: RunConfig, *, defaults: bool = True) -> dict[str, Any]:
    """Dotted key -> value of every setting; lists stay whole. defaults: also of those that have their default."""
    return dict(_flatten(config.model_dump(mode="json", exclude_defaults=not defaults), ""))


def flatten_differences(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in a, value in b) for every key that differs; a key that one side lacks counts as None there."""
    flat_a, flat_b = flatten(a), flatten(b)
    keys = [*flat_a, *(key for key in flat_b if key not in flat_a)]
    return {key: (flat_a.get(key), flat_b.get(key)) for key in keys if flat_a.get(key) != flat_b.get(key)}


def may_change_on_resume(key: str) -> bool:
    """Whether attempts at one run may differ in the setting with this dotted key. The field, or a section above it, says so."""
    return f"{key}.".startswith(_free_beginnings())


def changes_numbers(key: str) -> bool:
    """Whether two runs that differ in the setting with this dotted key have other numbers: it is no place, schedule or layout."""
    return key not in ("name", "output_dir") and (key == "num_global_steps" or not may_change_on_resume(key))


def flatten_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of nested plain settings, whether this version knows their keys or not; lists stay whole."""
    return dict(_flatten(dict(values), ""))


@functools.cache
def _free_beginnings() -> tuple[str, ...]:
    return tuple(f"{key}." for key in _free_keys(RunConfig, ""))


def _free_keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if ON_RESUME in field.metadata:
            yield f"{prefix}{name}"
        for section in sections_of(field.annotation):
            yield from _free_keys(section, f"{prefix}{name}.")


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):  # an empty one says nothing that its keys would not
        for key, child in value.items():
            yield from _flatten(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def explain(error: ValidationError, origins: Origins, path: Path, *, model: type[BaseModel]) -> str:
    """One line about the most helpful of the mistakes that pydantic found.

    Args:
        error: of the validation.
        origins: where each key was written.
        path: the file.
        model: what was validated, for descriptions and suggestions.
    """
    # A misspelt key is also a missing key; the misspelling is what helps.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    text = _explain_one(problems[0], origins, path, model)
    if len(problems) > 1:
        others = ", ".join(_dotted(problem["loc"]) for problem in problems[1:4])
        text += f" (and {len(problems) - 1} more: {others}{', ...' if len(problems) > 4 else ''})"
    return text


def _explain_one(problem: ErrorDetails, origins: Origins, path: Path, model: type[BaseModel]) -> str:
    loc = problem["loc"]
    key = _dotted(loc)
    origin = origins.origin(loc, otherwise=str(path))
    if problem["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {_suggestion(key, model)}"
    if problem["type"] == "missing":
        return f"{origins.origin(loc[:-1], otherwise=str(path))}: missing key {key}: {_description(loc, model)}"
    message = problem["msg"]
    if problem["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        message = message.removeprefix(f"{key}.")
        subject, equals, _ = message.partition(" = ")
        if equals and " " not in subject:  # our own checks begin with "key = value", relative to their section
            origin = origins.origin((*loc, *subject.split(".")), otherwise=str(path))
            return f"{origin}: {f'{key}.' if key else ''}{message}"
        return f"{origins.sources(loc, otherwise=str(path))}: {f'{key}: ' if key else ''}{message}"
    if problem["type"] in ("model_type", "dict_type") or "dictionary" in message:
        file = " or the path of a .yaml file with them" if len(loc) == 1 else ""
        choice = f"; did you mean {key}.{CHOICES[key]}={problem['input']}?" if key in CHOICES and isinstance(problem["input"], str) else ""
        return f"{origin}: {key} = {problem['input']!r}: expected a section, key: value lines{file}{choice}"
    expectation = message.removeprefix("Input should be ").removeprefix("String should ").removeprefix("List should ")
    return f"{origin}: {key} = {problem['input']!r}: expected {expectation}"


def _dotted(loc: tuple[str | int, ...]) -> str:
    return ".".join(map(str, loc))


def _descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Dotted key -> what it means, for every key that the model knows."""
    return dict(_walk(model, ""))


def _description(loc: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """Of the key, or of the nearest key above it (the second of two betas is no key of its own)."""
    known = _descriptions(model)
    return next((known[_dotted(loc[:end])] for end in range(len(loc), 0, -1) if _dotted(loc[:end]) in known), "required")


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        yield dotted, field.description or ""
        for section in sections_of(field.annotation):
            yield from _walk(section, f"{dotted}.")


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section that a field holds, if it holds one: Section, or Section | None."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _suggestion(key: str, model: type[BaseModel]) -> str:
    """The known key nearest to a wrong one: a misspelling or an abbreviation in the same section first, then the same word elsewhere."""
    known = list(_descriptions(model))
    section, _, leaf = key.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    elsewhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    short_for = [name for name in siblings if len(leaf) > 1 and "".join(word[0] for word in name.split("_")) == leaf]
    found = (
        siblings.get(closest(leaf, siblings, cutoff=0.8) or "")
        or next((siblings[name] for name in short_for), None)
        or elsewhere.get(closest(leaf, elsewhere, cutoff=0.8) or "")
        or siblings.get(closest(leaf, siblings, cutoff=0.5) or "")
    )
    return f"did you mean {found}?" if found else f"known here: {', '.join(siblings)}"
