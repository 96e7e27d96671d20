"""The end of a run: summary.json, the plots, one paragraph; also for a run that finished long ago.

Example: python -m megatron_minpro.report.run_report runs/tiny_moe_cpu
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.report import plots, summary
from megatron_minpro.run import profiling
from megatron_minpro.run.run_folder import CONFIG_FILE, RESULT_FILE
from megatron_minpro.tracking.metrics_file import METRICS_FILE, read_metrics


def write_report(config: RunConfig, run_dir: Path, seconds: Mapping[str, float]) -> str:
    """summary.json and the plots of a complete run; the paragraph to print. seconds: wall time by phase, of all attempts."""
    result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    metrics = list(read_metrics(run_dir / METRICS_FILE))
    measured = {}
    for label in ("before", "after"):
        content = json.loads((run_dir / f"evaluation_{label}.json").read_text(encoding="utf-8"))
        measured[label] = {name: value for name, value in content.items() if name.startswith("pass_at_")}
    built = summary.build_summary(
        metrics,
        staleness=config.staleness,
        updates=result["policy_version"],
        rollouts_sampled=result["rollouts_sampled"],
        rollouts_trained=result["rollouts_trained"],
        rollouts_lost=result["rollouts_lost"],
        rollouts_dropped=result["rollouts_dropped"],
        seconds=seconds,
        evaluation_before=measured["before"],
        evaluation_after=measured["after"],
    )
    summary.write_summary(run_dir, built)
    title = f"{config.name}: {config.objective.name}, staleness {config.staleness}"
    plots.plot_run(run_dir, metrics, title=title, evaluation_before=measured["before"], evaluation_after=measured["after"])
    said = summary.paragraph(built, name=config.name, objective=config.objective.name, staleness=config.staleness, run_dir=run_dir)
    return said if config.profile.steps is None else f"{said} {profiling.write_phases(config, run_dir, metrics)}"


def stopped(result: Mapping[str, Any]) -> str:
    """What to say of a run that ended before its last step. result: the content of result.json."""
    return f"stopped after {result['trained_batches']} trained batches with a checkpoint; the same command continues"


def main(arguments: list[str]) -> None:
    """For runs that were not started by `minpro train`, such as Slurm jobs."""
    run_dir = Path(arguments[0])
    result = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
    if not result["complete"]:
        print(f"{run_dir}: {stopped(result)}")
        return
    print(write_report(load_config(run_dir / CONFIG_FILE, []), run_dir, result["seconds"]))


if __name__ == "__main__":
    main(sys.argv[1:])
