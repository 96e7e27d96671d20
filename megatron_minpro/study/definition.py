"""STUDY.yaml: which settings vary over which levels, on top of which run, with which seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from checkpoints_convert.nearest_name import nearest
from megatron_minpro.config import ConfigError, explain
from megatron_minpro.config.settings import Origins
from megatron_minpro.config.yaml_text import YamlError, parse_yaml
from parallel.shipped import shipped_folder

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
_SUFFIXES = (".yaml", ".yml")


class _Section(BaseModel):
    """Frozen and closed: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Rule(_Section):
    """Settings of the cells that have all of these levels."""

    where: dict[str, Any] = Field(description="axis -> level, or a list of levels")
    set: dict[str, Any] = Field(min_length=1, description="dotted setting -> value")


class FigureConfig(_Section):
    """A picture of some cells, beside those that every study has."""

    name: str = Field(pattern=_NAME, description="of the file, without .png")
    curve: Literal["reward", "entropy", "clipped", "sample_size"] = Field(description="what is drawn over trained batches")
    where: dict[str, Any] = Field(default_factory=dict, description="axis -> level, or a list of levels")


class Level(_Section):
    """One level of an axis. settings: dotted setting -> value. place: where it was written."""

    name: str
    settings: dict[str, Any]
    place: str


class Study(_Section):
    """Every combination of the axes' levels, each with every seed. Settings apply in this order: base, overrides, axes, cells, seed."""

    name: str = Field(pattern=_NAME, description="of the study; its folder is output_dir/name")
    output_dir: str = Field(default="runs/studies", min_length=1, description="folder that holds the study's folder")
    base: str = Field(min_length=1, description="the run that varies: a configuration's file, or the name of a shipped one")
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted setting -> value, in all cells")
    axes: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        min_length=1,
        description="name -> levels. A list holds values of the setting that the name says; a mapping holds named levels, each with its "
        "settings",
    )
    cells: list[Rule] = Field(default_factory=list, description="settings that depend on several axes; a later rule wins")
    seeds: list[int] = Field(description="of the runs; cells with the same seed are compared with each other")
    reference: dict[str, Any] = Field(
        default_factory=dict, description="axis -> its level that the other levels are compared with; one axis"
    )
    figures: list[FigureConfig] = Field(default_factory=list, description="pictures of chosen cells")
    smoke: dict[str, Any] = Field(default_factory=dict, description="dotted setting -> value, under --smoke alone")
    delete_runs: bool = Field(default=False, description="remove the run folder of a cell once its row is on disk")

    _origins: Origins = PrivateAttr(default_factory=Origins)
    _path: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _is_consistent(self) -> Study:
        for name, levels in self.axes.items():
            if not levels:
                raise ValueError(f"axes.{name} = {levels!r}: expected at least one level")
        if "seed" in self.axes:
            raise ValueError(f"axes.seed = {self.axes['seed']!r}: expected the numbers under seeds")
        if not self.seeds:
            raise ValueError(f"seeds = {self.seeds!r}: expected at least one seed")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {self.seeds!r}: expected every seed once")
        if len(self.reference) > 1:
            raise ValueError(f"reference = {self.reference!r}: expected one axis and its level")
        for axis, level in self.reference.items():
            self._check_level("reference", axis, level)
        chosen = {f"cells.{index}.where": rule.where for index, rule in enumerate(self.cells)}
        chosen |= {f"figures.{index}.where": figure.where for index, figure in enumerate(self.figures)}
        for key, where in chosen.items():
            for axis, levels in where.items():
                for level in levels if isinstance(levels, list) else [levels]:
                    self._check_level(key, axis, level)
        return self

    def _check_level(self, key: str, axis: str, level: Any) -> None:
        if axis not in self.axes:
            raise ValueError(f"{key}.{axis} = {level!r}: no axis has this name; {nearest(axis, self.axes)}")
        known = [level_name(each) for each in self.axes[axis]]
        if level_name(level) not in known:
            raise ValueError(f"{key}.{axis} = {level!r}: the axis has no such level; {nearest(level_name(level), known)}")

    @property
    def folder(self) -> Path:
        """Holds the rows, the reports and the run folders."""
        return Path(self.output_dir) / self.name

    def place(self, *path: str | int) -> str:
        """File and line of a key, for error messages."""
        return self._origins.origin(path, otherwise=str(self._path))

    def levels(self, axis: str) -> list[Level]:
        """The axis' levels in order."""
        found = self.axes[axis]
        if isinstance(found, dict):
            return [Level(name=name, settings=settings, place=self.place("axes", axis, name)) for name, settings in found.items()]
        place = self.place("axes", axis)
        return [Level(name=level_name(value), settings={axis: value}, place=place) for value in found]

    @property
    def origins(self) -> Origins:
        """Where each key was written."""
        return self._origins

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def remember(self, origins: Origins, path: Path) -> None:
        """Keep where each key was written."""
        self._origins, self._path = origins, path


def level_name(value: Any) -> str:
    """How a level is called: a name is itself, a value is what YAML would write, a list is its items."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "-".join(level_name(each) for each in value)
    return str(value)


def meets(where: Mapping[str, Any], levels: Mapping[str, str]) -> bool:
    """Whether these levels are among those that a rule or a figure names."""
    return all(levels[axis] in levels_of(chosen) for axis, chosen in where.items())


def levels_of(chosen: Any) -> list[str]:
    """The names behind a level or a list of levels."""
    return [level_name(each) for each in (chosen if isinstance(chosen, list) else [chosen])]


def read_study(path: str | Path) -> Study:
    """Read and check a study's file.

    Args:
        path: a file, or the name of a shipped study, such as lag_sweep_tiny.

    Raises:
        ConfigError: one line says which file and line, which key, its value, and what was expected.
    """
    path = _find(Path(path))
    try:
        values, lines = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected text in UTF-8") from None
    except YamlError as error:
        raise ConfigError(f"{path}:{error.line}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected key: value lines, found {type(values).__name__}")
    origins = Origins({key: f"{path}:{line}" for key, line in lines.items()})
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, origins, path, model=Study)) from None
    study.remember(origins, path)
    return study


def _find(path: Path) -> Path:
    if path.suffix in _SUFFIXES or len(path.parts) != 1:
        return path
    folder = shipped_folder("study")
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if path.name not in known:
        raise ConfigError(f"{path}: no shipped study has this name; {nearest(path.name, known)}; a file's name ends in .yaml")
    found = folder / f"{path.name}.yaml"
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found
