"""STUDY_DIR/rows.jsonl: one line for each cell that has ended. Reports need nothing else; the file can be continued on another machine."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from megatron_minpro.report.measures import rounded, run_measures, thin, trained_curves
from megatron_minpro.report.runs import evaluation_files
from megatron_minpro.study.cells import Cell
from megatron_minpro.tracking.json_lines import JsonLines, line_number, read_json_lines
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics
from megatron_minpro.tracking.run_files import RESULT_FILE, SECONDS_FILE

ROWS_FILE = "rows.jsonl"
_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell. settings: those that the study names, of the digest's. curves: a value per `stride` trained batches, from the first on."""

    cell: str
    levels: Mapping[str, str]
    seed: int
    status: Literal["ok", "failed"]
    error: str | None = None
    digest: str
    settings: Mapping[str, Any]
    measures: Mapping[str, float] = field(default_factory=dict)
    batches: int = 0  # trained
    stride: int = 1
    curves: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)  # wall time by phase, of all attempts
    ended_at: str = ""


def finished_row(cell: Cell) -> Row:
    """Of a run folder whose run is complete. Raises ValueError when no batch was trained, or a file is damaged."""
    run_dir = cell.config.run_dir
    metrics = list(read_metrics(run_dir / METRICS_FILE))
    curves = trained_curves(metrics)
    evaluations = _evaluations(run_dir)
    clock = run_dir / SECONDS_FILE  # of `minpro train`; a job of several nodes has none
    seconds = {**_read(run_dir / RESULT_FILE)["seconds"], **(_read(clock) if clock.exists() else {})}
    measures = run_measures(metrics, evaluations, seconds)
    batches = len(curves["reward"])
    thinned = {name: thin(curve) for name, curve in curves.items() if any(value is not None for value in curve)}
    return Row(
        cell=cell.name,
        levels=dict(cell.levels),
        seed=cell.seed,
        status="ok",
        digest=cell.digest,
        settings=cell.named,
        measures={name: rounded(value) for name, value in measures.items()},
        batches=batches,
        stride=-(-batches // len(thinned["reward"])),
        curves=thinned,
        evaluations=evaluations,
        seconds={name: rounded(value) for name, value in seconds.items()},
        ended_at=time.strftime("%F %T"),
    )


def failed_row(cell: Cell, error: str) -> Row:
    """Of a cell that ended with an error, in one line."""
    return Row(
        cell=cell.name,
        levels=dict(cell.levels),
        seed=cell.seed,
        status="failed",
        error=error,
        digest=cell.digest,
        settings=cell.named,
        ended_at=time.strftime("%F %T"),
    )


def is_complete(run_dir: Path) -> bool:
    """Whether the run in this folder has trained all of its batches and measured what follows."""
    path = run_dir / RESULT_FILE
    return path.exists() and bool(_read(path)["complete"])


def append_row(folder: Path, row: Row) -> None:
    """Write one line; it is on disk when this returns. Several processes may append to one file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{ROWS_FILE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with closing(JsonLines(folder / ROWS_FILE)) as file:  # its close is an fsync
            file.append(asdict(row))


def read_rows(folder: Path) -> dict[str, Row]:
    """Cell -> its row; of several lines for one cell the last one counts. An unfinished last line is left out.

    Raises:
        ValueError: a line is not a row; names file and line.
    """
    path = folder / ROWS_FILE
    names = {each.name for each in fields(Row)}
    rows: dict[str, Row] = {}
    begin = 0
    for end, line in read_json_lines(path):
        try:
            row = Row(**{name: value for name, value in line.items() if name in names})
        except TypeError as error:
            raise ValueError(f"{path}:{line_number(path, begin)}: expected a row of a study ({error})") from error
        rows[row.cell] = row
        begin = end
    return rows


def rows_of(folder: Path, cells: Iterable[Cell]) -> tuple[dict[str, Row], int]:
    """The rows of these cells, and how many rows of other cells there are.

    Raises:
        ValueError: a row was made with another configuration; names the cell and what differs.
    """
    found = read_rows(folder)
    rows: dict[str, Row] = {}
    for cell in cells:
        if (row := found.get(cell.name)) is not None:
            if row.digest != cell.digest:
                differing = (
                    _differences(row.settings, cell.named) or "in settings that the study's file does not name, so those of its base"
                )
                raise ValueError(
                    f"{folder / ROWS_FILE}: {cell.name} was made with another configuration ({differing}); "
                    "expected another name of the study, or the old settings"
                )
            rows[cell.name] = row
    return rows, len(found) - len(rows)


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    keys = [key for key in dict.fromkeys([*there, *here]) if there.get(key) != here.get(key)]
    shown = "; ".join(f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:_SHOWN_DIFFERENCES])
    return shown + (f"; and {len(keys) - _SHOWN_DIFFERENCES} more" if len(keys) > _SHOWN_DIFFERENCES else "")


def _evaluations(run_dir: Path) -> dict[str, dict[str, float]]:
    """before, step_..., after -> pass@k by name."""
    contents = {label: _read(path) for label, path in evaluation_files(run_dir).items()}
    return {
        label: {name: rounded(value) for name, value in content.items() if name.startswith("pass_at_")}
        for label, content in contents.items()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error})") from error
