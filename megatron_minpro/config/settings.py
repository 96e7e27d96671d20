"""Plain settings before they are validated: nested mappings that remember where each key was written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_minpro.config.yaml_text import KeyPath, YamlError, parse_yaml

COMMAND_LINE = "command line"

# The sections that are one entry of a registry plus that entry's own options, and the key that names the entry.
CHOICES = {"objective": "name", "reward": "name", "advantages": "estimator"}

_VARIABLE = re.compile(r"\$(?P<escaped>\$\{)|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}")


class ConfigError(ValueError):
    """A configuration that cannot be used: one line with the file (or command line), the key, its value and what was expected."""


@dataclass(frozen=True, slots=True)
class Origins:
    """Which file and line (or the command line) every key came from. Two are always equal: where a setting stands changes no run."""

    places: dict[KeyPath, str] = field(default_factory=dict, compare=False)

    def origin(self, path: KeyPath, *, otherwise: str) -> str:
        """Where the key at `path`, or the nearest key above it, was written."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return otherwise

    def sources(self, path: KeyPath, *, otherwise: str) -> str:
        """Where the section at `path` was written, for a mistake that may lie in any of its keys."""
        origin = self.origin(path, otherwise=otherwise)
        overridden = any(known[: len(path)] == path and place == COMMAND_LINE for known, place in self.places.items())
        return f"{origin} with the overrides of the {COMMAND_LINE}" if overridden and origin != COMMAND_LINE else origin


class Settings:
    """Nested plain values, and the place that each was read from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins = Origins()
        self._overriding = {COMMAND_LINE}  # places of overrides

    def read_file(self, path: Path, *, section: str | None = None) -> None:
        """Replace everything (or one section) by the mapping that the YAML file holds.

        Top-level sections given as the path of a .yaml file are read from there. Raises ConfigError naming file, line and key.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: expected text in UTF-8") from None
        try:
            values, lines = parse_yaml(text)
        except YamlError as error:
            raise ConfigError(f"{path}:{error.line}: not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected key: value lines, found {type(values).__name__}")
        prefix: KeyPath = () if section is None else (section,)
        origins = {(*prefix, *key_path): f"{path}:{line}" for key_path, line in lines.items()}
        values = _expand(values, prefix, origins)
        self.replace(section, values, origins)
        if section is None:
            for key, value in list(values.items()):
                if _is_file(value) and key not in ("name", "output_dir"):
                    self.read_file(Path(value), section=key)

    def replace(self, section: str | None, values: Any, origins: Mapping[KeyPath, str]) -> None:
        """Put `values` in place of everything, or of one top-level section."""
        if section is None:
            self.values, self.origins = values, Origins(dict(origins))
            return
        self.values[section] = values
        places = {path: origin for path, origin in self.origins.places.items() if path[0] != section} | dict(origins)
        places.setdefault((section,), next(iter(origins.values()), COMMAND_LINE))
        self.origins = Origins(places)

    def override(self, assignment: str, *, place: str = COMMAND_LINE) -> None:
        """Apply one key=value; the value is YAML. A later assignment wins over an earlier one.

        `section=path.yaml` reads the section from the file. Another objective.name (reward.name, advantages.estimator) drops the
        options that came from a file, so that the defaults published for the new one apply; options of other overrides stay.

        Args:
            assignment: key=value.
            place: where it was written, for error messages.
        """
        self._overriding.add(place)
        dotted, equals, text = assignment.partition("=")
        path = tuple(dotted.split("."))
        if not equals or not all(path):
            raise ConfigError(f"{place}: {assignment!r}: expected key=value, as in rollout.group_size=8")
        try:
            value, lines = parse_yaml(text)
        except YamlError as error:
            raise ConfigError(f"{place}: {dotted} = {text!r}: not valid YAML: {error}") from None
        origins: dict[KeyPath, str] = {path: place, **{(*path, *key_path): place for key_path in lines}}
        value = _expand(value, path, origins)
        if len(path) == 1 and _is_file(value) and path[0] not in ("name", "output_dir"):
            self.read_file(Path(value), section=path[0])
            return
        if len(path) == 2 and CHOICES.get(path[0]) == path[1]:
            self._drop_options_of_another(path[0], value)
        self._set(path, value, place)
        self.origins = Origins({known: place for known, place in self.origins.places.items() if known[: len(path)] != path} | origins)

    def _drop_options_of_another(self, section: str, name: Any) -> None:
        choice = self.values.get(section)
        if not isinstance(choice, dict) or choice.get(CHOICES[section]) == name:
            return
        for key in [key for key in choice if self.origins.origin((section, key), otherwise="") not in self._overriding]:
            del choice[key]

    def _set(self, path: KeyPath, value: Any, place: str) -> None:
        section: Any = self.values
        for depth, key in enumerate(path[:-1], start=1):
            child = section.get(key)
            if child is None:
                child = section[key] = {}
                self.origins = Origins({**self.origins.places, path[:depth]: place})
            if not isinstance(child, dict):
                dotted, above = (".".join(map(str, part)) for part in (path, path[:depth]))
                raise ConfigError(f"{place}: {dotted}: {above} is a value, not a section")
            section = child
        section[path[-1]] = value


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.endswith((".yaml", ".yml"))


def _expand(value: Any, path: KeyPath, origins: Mapping[KeyPath, str]) -> Any:
    """Put environment variables in place of ${NAME} in every string; $${ stands for a literal ${."""
    if isinstance(value, dict):
        return {key: _expand(child, (*path, key), origins) for key, child in value.items()}
    if isinstance(value, list):
        return [_expand(child, (*path, index), origins) for index, child in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "${"
        if match["name"] not in os.environ:
            keys = [origin for known, origin in origins.items() if path[: len(known)] == known]
            raise ConfigError(f"{keys[-1]}: {'.'.join(map(str, path))} = {value!r}: the environment variable {match['name']} is not set")
        return os.environ[match["name"]]

    return _VARIABLE.sub(replacement, value)


def escape(value: Any) -> Any:
    """The inverse of expansion: protect every literal ${ in strings."""
    if isinstance(value, dict):
        return {key: escape(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escape(child) for child in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
