"""A run's settings, and how they differ from the shipped configuration that is nearest to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_minpro.config import ConfigError, flatten, load_config
from megatron_minpro.report.page.visible_text import visible
from parallel.shipped import shipped_folder

_OF_THE_PLACE = ("name", "output_dir")  # say which run and where, not what it does
_ABSENT = "—"
_LONGEST_VALUE = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A setting that is not the shipped one."""

    key: str
    value: str
    shipped: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The shipped configuration with the fewest differences."""

    name: str
    differences: tuple[Difference, ...]


def nearest_shipped(settings: Mapping[str, Any], shipped: Mapping[str, Mapping[str, Any]]) -> Nearest | None:
    """None where nothing is shipped or nothing is known of the run.

    Args:
        settings: of the run, dotted key -> value.
        shipped: name -> settings. The one with the run's own name is taken first, else that with the fewest differences.
    """
    if not settings or not shipped:
        return None
    found = {name: _differences(settings, other) for name, other in shipped.items()}
    own = settings.get("name")
    name = own if own in found else min(sorted(found), key=lambda one: len(found[one]))
    return Nearest(name=name, differences=tuple(found[name]))


def shipped_settings() -> dict[str, dict[str, Any]]:
    """Name -> settings of each shipped configuration that this machine can read. Paths are as in the file: relative."""
    found = {}
    for path in sorted(shipped_folder().glob("*.yaml")):
        try:
            found[path.stem] = {key: _relative(value) for key, value in flatten(load_config(path, [])).items()}
        except ConfigError:
            continue  # names an environment variable that is not set here
    return found


def shown_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, value) of all settings, as text."""
    return [(visible(key), shown_value(value)) for key, value in settings.items()]


def _differences(settings: Mapping[str, Any], shipped: Mapping[str, Any]) -> list[Difference]:
    keys = [*settings, *(key for key in shipped if key not in settings)]
    return [
        Difference(key=visible(key), value=shown_value(settings.get(key, _ABSENT)), shipped=shown_value(shipped.get(key, _ABSENT)))
        for key in keys
        if key not in _OF_THE_PLACE and not _same(settings.get(key, _ABSENT), shipped.get(key, _ABSENT))
    ]


def _relative(value: Any) -> Any:
    """A path that reading has made absolute, as it stood in the file."""
    folder = f"{Path.cwd()}{os.sep}"
    return value.removeprefix(folder) if isinstance(value, str) else value


def _same(value: Any, shipped: Any) -> bool:
    """Whether a run's value is the shipped one: a relative path in whichever folder."""
    is_path = isinstance(value, str) and isinstance(shipped, str) and os.sep in shipped
    return value == shipped or (is_path and os.path.isabs(value) and value.endswith(f"{os.sep}{shipped}"))


def shown_value(value: Any) -> str:
    """A setting's value as in a YAML file, without controls and not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return visible(str(value), limit=_LONGEST_VALUE)
