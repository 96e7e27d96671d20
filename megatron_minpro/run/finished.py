"""The report of a run folder: summary.json, plots and a page, and one paragraph for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.report import summary
from megatron_minpro.report.runs import read_run
from megatron_minpro.run import profiling
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics
from megatron_minpro.tracking.run_files import CONFIG_FILE, RESULT_FILE, SECONDS_FILE


def report(run_dir: Path) -> str:
    """Write the report of a run that `minpro train` or a job script made. Of a run that is not complete, only the plots.

    Returns:
        What to print.

    Raises:
        ValueError: the folder holds no run, or a file of it is damaged.
    """
    for name in (CONFIG_FILE, METRICS_FILE):
        if not (run_dir / name).is_file():
            raise ValueError(f"{run_dir}: holds no {name}; expected the folder of a run that has begun")
    config = load_config(run_dir / CONFIG_FILE, [])
    result = _read(run_dir / RESULT_FILE)
    if result is None or not result["complete"]:
        _plot(config, run_dir, after={})
        state = stopped(result) if result is not None else "not at its end"
        return f"{run_dir}: {state}; the plots so far are in {run_dir / 'plots'}"
    return write_report(config, run_dir, {**result["seconds"], **(_read(run_dir / SECONDS_FILE) or {})})


def write_report(config: RunConfig, run_dir: Path, seconds: Mapping[str, float]) -> str:
    """Write summary.json and the plots of a complete run.

    Args:
        config: of the run.
        run_dir: its folder.
        seconds: wall time by phase, of all attempts.

    Returns:
        The paragraph to print.
    """
    built = summarise(config, run_dir, seconds)
    summary.write_summary(run_dir, built)
    _plot(config, run_dir, after=_evaluation(run_dir, "after"))
    said = summary.paragraph(built, name=config.name, objective=config.objective.name, staleness=config.staleness, run_dir=run_dir)
    if config.profile.steps is None:
        return said
    return f"{said} {profiling.write_phases(config, run_dir, list(read_metrics(run_dir / METRICS_FILE)))}"


def write_page(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write one page about these runs, of whichever state.

    Args:
        run_dirs: their folders, at least one.
        path: of the page.

    Returns:
        path.

    Raises:
        ValueError: a folder holds no run.
    """
    views = [read_run(run_dir) for run_dir in run_dirs]
    from megatron_minpro.report.page import write  # here, as the plots: the chart library takes long to import

    return write.write_page(views, path)


def summarise(config: RunConfig, run_dir: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The contents of summary.json, from result.json, metrics.jsonl and the evaluations of a complete run."""
    result = _read(run_dir / RESULT_FILE)
    assert result is not None
    return summary.build_summary(
        list(read_metrics(run_dir / METRICS_FILE)),
        staleness=config.staleness,
        updates=result["policy_version"],
        rollouts_sampled=result["rollouts_sampled"],
        rollouts_trained=result["rollouts_trained"],
        rollouts_lost=result["rollouts_lost"],
        rollouts_dropped=result["rollouts_dropped"],
        seconds=seconds,
        evaluation_before=_evaluation(run_dir, "before"),
        evaluation_after=_evaluation(run_dir, "after"),
    )


def stopped(result: Mapping[str, Any]) -> str:
    """What to say of a run that ended before its last step. result: the content of result.json."""
    return f"stopped after {result['trained_batches']} trained batches with a checkpoint; the same command continues"


def _plot(config: RunConfig, run_dir: Path, *, after: Mapping[str, float]) -> None:
    from megatron_minpro.report import plots  # here, because the ranks need the summary alone: matplotlib takes long to import

    plots.plot_run(
        run_dir,
        list(read_metrics(run_dir / METRICS_FILE)),
        title=f"{config.name}: {config.objective.name}, staleness {config.staleness}",
        evaluation_before=_evaluation(run_dir, "before"),
        evaluation_after=after,
    )


def _evaluation(run_dir: Path, label: str) -> dict[str, float]:
    """pass@k by name; nothing where it was not measured."""
    content = _read(run_dir / f"evaluation_{label}.json") or {}
    return {name: value for name, value in content.items() if name.startswith("pass_at_")}


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON file of the run folder; None where it does not exist. Raises ValueError naming the file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object ({error})") from error
