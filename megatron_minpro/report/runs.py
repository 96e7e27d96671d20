"""A run folder as reports see it: what is there, and one line for everything that is missing or cannot be read.

A report is also made of runs that are under way, were killed, or come from an older version, so no file is required but config.yaml or
metrics.jsonl.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_minpro.config import ConfigError, RunConfig, flatten, flatten_settings, load_config
from megatron_minpro.config.settings import Settings
from megatron_minpro.report.summary import SUMMARY_FILE
from megatron_minpro.tracking.metrics_file import METRICS_FILE
from megatron_minpro.tracking.run_files import CONFIG_FILE, RESULT_FILE, SECONDS_FILE
from megatron_minpro.tracking.versions import AttemptVersions, read_versions

State = Literal["complete", "stopped", "running or killed"]
Metrics = Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What a run folder holds."""

    path: Path  # of the folder, as it was given
    name: str  # of the run; of the folder where the configuration says none
    config: RunConfig | None  # None: this version cannot read it, `notes` say why
    settings: Mapping[str, Any]  # dotted key -> value; of an older configuration as far as it is YAML
    metrics: Sequence[Metrics]  # lines of metrics.jsonl; each has a global_step
    evaluations: Mapping[str, Mapping[str, float]]  # before, step_000010, ..., after -> {"pass_at_1": 0.34, ...}, in this order
    summary: Mapping[str, Any] | None  # summary.json
    result: Mapping[str, Any] | None  # result.json
    seconds: Mapping[str, float]  # wall time by phase, of all attempts
    attempts: Sequence[AttemptVersions]  # in order; none where the folder does not say
    state: State
    notes: Sequence[str]  # one line each: what is missing or could not be read

    @property
    def seed(self) -> int | None:
        """Of the run; None where the configuration says none."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None


def read_run(path: str | Path) -> RunView:
    """Read a run folder. Damaged and missing files become notes.

    Raises:
        ValueError: the folder holds neither config.yaml nor metrics.jsonl.
    """
    path = Path(path)
    if not any((path / name).is_file() for name in (CONFIG_FILE, METRICS_FILE)):
        raise ValueError(f"{path}: holds neither {CONFIG_FILE} nor {METRICS_FILE}; expected the folder of a run")
    notes: list[str] = []
    config, settings = _read_config(path / CONFIG_FILE, notes)
    metrics = _read_metrics(path / METRICS_FILE, notes)
    result = _read_object(path / RESULT_FILE, notes)
    evaluations = {label: _known_numbers(_read_object(file, notes)) for label, file in evaluation_files(path).items()}
    return RunView(
        path=path,
        name=str(settings.get("name") or path.resolve().name),
        config=config,
        settings=settings,
        metrics=metrics,
        evaluations=evaluations,
        summary=_read_object(path / SUMMARY_FILE, notes),
        result=result,
        seconds=_seconds(path, result, notes),
        attempts=_attempts(path, notes),
        state="running or killed" if result is None else "complete" if result.get("complete") is True else "stopped",
        notes=notes,
    )


def evaluation_files(run_dir: Path) -> dict[str, Path]:
    """before, step_000010, ..., after -> the file of this held-out measurement, in this order."""
    files = {path.stem.removeprefix("evaluation_"): path for path in sorted(run_dir.glob("evaluation_*.json"))}
    order = sorted(files, key=lambda label: (label != "before", label == "after"))  # stable: the steps stay sorted
    return {label: files[label] for label in order if label in ("before", "after") or label.startswith("step_")}


def _read_config(path: Path, notes: list[str]) -> tuple[RunConfig | None, dict[str, Any]]:
    if not path.is_file():
        notes.append(f"{CONFIG_FILE}: missing; settings are not known")
        return None, {}
    try:
        config = load_config(path.absolute(), [])
        return config, flatten(config)
    except ValueError as error:
        notes.append(f"{CONFIG_FILE}: of another version or project: {_one_line(error, path)}")
    settings = Settings()
    try:
        settings.read_file(path)
        return None, flatten_settings(settings.values)
    except ConfigError:  # said already
        return None, {}


def _read_metrics(path: Path, notes: list[str]) -> list[Metrics]:
    if not path.is_file():
        notes.append(f"{METRICS_FILE}: missing; no step has ended")
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        notes.append(f"{METRICS_FILE}:{len(lines) + 1}: the last line is unfinished and is left out")
    found: list[Metrics] = []
    damaged = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("global_step"), int):
            found.append(_numbers(record))
        else:
            damaged.append(number)
    if damaged:
        notes.append(f"{METRICS_FILE}:{damaged[0]}: expected a JSON object with a global_step; {len(damaged)} such lines are left out")
    elif not found:
        notes.append(f"{METRICS_FILE}: no step has ended")
    return found


def _read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object; None where the file does not exist, and with a note where it holds something else."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: expected a JSON object ({_one_line(error, path)})")
        return None
    if not isinstance(content, dict):
        notes.append(f"{path.name}: expected a JSON object, found a {type(content).__name__}")
        return None
    return content


def _seconds(run_dir: Path, result: Mapping[str, Any] | None, notes: list[str]) -> dict[str, float]:
    """Those of the launcher, which counts all attempts, before those of the last attempt. A job of several nodes has no launcher."""
    of_attempt = (result or {}).get("seconds")
    counted = _known_numbers(of_attempt if isinstance(of_attempt, dict) else None)
    return counted | _known_numbers(_read_object(run_dir / SECONDS_FILE, notes))


def _attempts(run_dir: Path, notes: list[str]) -> list[AttemptVersions]:
    try:
        return read_versions(run_dir)
    except (OSError, ValueError) as error:
        notes.append(" ".join(str(error).split()).removeprefix(f"{run_dir}/"))
        return []


def _known_numbers(record: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: value for name, value in _numbers(record or {}).items() if value is not None}


def _numbers(record: Mapping[str, Any]) -> dict[str, float | None]:
    """Without values that are no numbers; None for one that is not finite."""
    return {
        name: value if value is None or math.isfinite(value) else None
        for name, value in record.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _one_line(error: Exception, path: Path) -> str:
    return " ".join(str(error).split()).removeprefix(f"{path.absolute()}:").strip()
