"""The cells of a study: every combination of levels with every seed, each a run with a configuration of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_minpro.config import ConfigError, Placed, RunConfig, changes_numbers, flatten, load_config
from megatron_minpro.study.definition import Level, Study, meets
from megatron_minpro.study.smoke import covering, shortened

CELLS_FOLDER = "cells"  # of the study's folder: the run folders, and beside each its configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a study.

    levels: axis -> name of the level. settings: what changes the run's numbers, defaults left out. digest: of them. named: those of them
    that the study gives, the others being its base configuration's.
    """

    name: str
    levels: Mapping[str, str]
    seed: int
    config: RunConfig
    settings: Mapping[str, Any]
    digest: str
    named: Mapping[str, Any]


def make_cells(study: Study, *, smoke: bool = False) -> list[Cell]:
    """All cells, seed by seed, so that every level has a row after the first seed.

    Args:
        study: its definition.
        smoke: only those of the covering design, shortened; see smoke.py.

    Raises:
        ConfigError: two cells have one name, or a cell's configuration is wrong; names the file, line, key and expectation.
    """
    chosen = combinations(study)
    if smoke:
        runs = covering(study)
        chosen = [levels for levels in chosen if {axis: level.name for axis, level in levels.items()} in runs]
    cells: dict[str, Cell] = {}
    for seed in study.seeds:
        for combination in chosen:
            cell = _make_cell(study, combination, seed, smoke=smoke)
            if cell.name in cells:
                other = cells[cell.name]
                raise ConfigError(
                    f"{study.place('axes')}: two cells are called {cell.name}: {_levels(other.levels)} and {_levels(cell.levels)}; "
                    "expected levels with different names"
                )
            cells[cell.name] = cell
    return list(cells.values())


def combinations(study: Study) -> list[dict[str, Level]]:
    """Axis -> level, in the order of the file; the last axis changes first."""
    axes = list(study.axes)
    return [dict(zip(axes, levels, strict=True)) for levels in itertools.product(*(study.levels(axis) for axis in axes))]


def group_name(levels: Mapping[str, str], named: Sequence[str]) -> str:
    """Of the cells that differ in the seed alone. named: axes whose levels say what they are without the axis' name."""
    parts = [level if axis in named else f"{axis.rpartition('.')[2]}{level}" for axis, level in levels.items()]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def named_axes(study: Study) -> list[str]:
    """The axes whose levels have names of their own."""
    return [axis for axis, levels in study.axes.items() if isinstance(levels, dict)]


def _make_cell(study: Study, levels: Mapping[str, Level], seed: int, *, smoke: bool) -> Cell:
    names = {axis: level.name for axis, level in levels.items()}
    name = f"{group_name(names, named_axes(study))}_seed{seed}"
    assigned = [_assign(key, value, study.place("overrides", key)) for key, value in study.overrides.items()]
    for level in levels.values():
        assigned += [_assign(key, value, level.place) for key, value in level.settings.items()]
    for index, rule in enumerate(study.cells):
        if meets(rule.where, names):
            assigned += [_assign(key, value, study.place("cells", index, "set", key)) for key, value in rule.set.items()]
    assigned += [_assign("seed", seed, study.place("seeds")), _assign("name", name, study.place("name"))]
    assigned += [_assign("output_dir", str(study.folder / CELLS_FOLDER), study.place("output_dir"))]
    config = load_config(study.base, assigned)
    if smoke:
        assigned += [_assign(key, value, "--smoke") for key, value in shortened(config, study.folder).items()]
        assigned += [_assign(key, value, study.place("smoke", key)) for key, value in study.smoke.items()]
        config = load_config(study.base, assigned)
    settings = settings_of(config)
    given = tuple(f"{each.assignment.partition('=')[0]}." for each in assigned)
    named = {key: value for key, value in settings.items() if f"{key}.".startswith(given)}
    return Cell(name=name, levels=names, seed=seed, config=config, settings=settings, digest=digest(settings), named=named)


def _assign(key: str, value: Any, place: str) -> Placed:
    return Placed(f"{key}={json.dumps(value)}", place)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that change the run's numbers, without those at their default: a later version may have more of them.

    A path below the working folder is relative: another machine has another one.
    """
    return {key: _relative(value) for key, value in flatten(config, defaults=False).items() if changes_numbers(key)}


def digest(settings: Mapping[str, Any]) -> str:
    """Of the settings: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _relative(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith("/"):
        return value
    path = Path(value)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else value


def _levels(levels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} {level}" for axis, level in levels.items())
