"""Predicted against published: python -m parallel.planner.accuracy [FOLDER] prints a table and writes it there with parity.png."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table

from parallel.planner.efficiency import DEFAULT, Efficiency
from parallel.planner.fit import fit
from parallel.planner.measured import MeasuredRun, read_measured_runs
from parallel.planner.published import Row, read_rows
from parallel.planner.published_rl import RlRow, read_rl_rows

_COLOURS = {"qwen3_30b_a3b": "#2a5db0", "qwen3_235b_a22b": "#d9722b", "deepseek_v3": "#3f8f5b"}


def errors(rows: Sequence[Row], efficiency: Efficiency = DEFAULT) -> list[float]:
    """Signed relative error of the predicted step time of every row."""
    return [row.predicted_s(efficiency) / row.published_s - 1 for row in rows]


def memory_errors(rows: Sequence[Row]) -> list[float]:
    """Signed relative error of the predicted peak memory, of the rows that publish one."""
    return [row.predicted_gb() / row.peak_gb - 1 for row in rows if row.peak_gb is not None]


def leave_one_model_out(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Model -> errors on all its rows, of constants fitted on the other models' `fit` rows alone."""
    found = {}
    for model in sorted({row.model for row in rows}):
        others = [row for row in rows if row.use == "fit" and row.model != model]
        found[model] = errors([row for row in rows if row.model == model], fit(others))
    return found


def summary(rows: Sequence[Row]) -> list[str]:
    """Mean and largest absolute errors: fitted rows, checked rows, all; memory; one model left out."""
    lines = [_error_line(f"time, rows to {use}", errors([row for row in rows if row.use == use])) for use in ("fit", "check")]
    lines += [_error_line("time, all rows", errors(rows)), _error_line("memory, nothing fitted", memory_errors(rows))]
    lines += [_error_line(f"time of {model}, constants without it", found) for model, found in leave_one_model_out(rows).items()]
    return lines


def _error_line(name: str, found: Sequence[float]) -> str:
    mean, largest = sum(map(abs, found)) / len(found), max(map(abs, found))
    return f"{name}: {len(found)} rows, mean {mean:.1%}, largest {largest:.1%}, bias {sum(found) / len(found):+.1%}"


def table(rows: Sequence[Row]) -> Table:
    """One line per row."""
    shown = Table(title="training step, predicted against published", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("row", no_wrap=True)
    for name in ("use", "published s", "predicted s", "published TF", "predicted TF", "error", "peak GB", "predicted GB"):
        shown.add_column(name, justify="left" if name == "use" else "right")
    for row, error in zip(rows, errors(rows), strict=True):
        predicted = (1 + error) * row.published_s
        peak = ("", "") if row.peak_gb is None else (f"{row.peak_gb:.1f}", f"{row.predicted_gb():.1f}")
        rates = (f"{row.published_tflops:.0f}", f"{row.published_tflops / (1 + error):.0f}")
        shown.add_row(row.id, row.use, f"{row.published_s:.1f}", f"{predicted:.1f}", *rates, f"{error:+.1%}", *peak)
    return shown


def rl_table(rows: Sequence[RlRow]) -> Table:
    """Whole steps of reinforcement learning; the prediction is what the parts take, without waiting for anything else."""
    shown = Table(title="RL step, predicted against published (nothing fitted)", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("row", no_wrap=True)
    for name in ("published s", "predicted s", "error", "sampling s", "log-probs s", "update s"):
        shown.add_column(name, justify="right")
    for row in rows:
        seconds = [f"{value:.1f}" for value in (row.sampling_s, row.parts.logprobs_s, row.parts.updates_s)]
        shown.add_row(row.id, f"{row.published_s:.1f}", f"{row.predicted_s:.1f}", f"{row.predicted_s / row.published_s - 1:+.0%}", *seconds)
    return shown


def measured_table(runs: Sequence[MeasuredRun]) -> Table:
    """Steps of the tiny job; the prediction is what the schedule makes of the measured phases."""
    shown = Table(
        title="step of the tiny job, composed of its measured phases against measured",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    shown.add_column("run", no_wrap=True)
    for name in ("measured s", "composed s", "error"):
        shown.add_column(name, justify="right")
    for run in runs:
        shown.add_row(run.id, f"{run.measured_s:.2f}", f"{run.composed_s:.2f}", f"{run.composed_s / run.measured_s - 1:+.1%}")
    return shown


def plot_parity(rows: Sequence[Row], path: Path) -> None:
    """Predicted against published TFLOP/s per GPU; filled: rows that no constant saw."""
    figure, axes = plt.subplots(figsize=(5.6, 5.4), dpi=150)
    for row, error in zip(rows, errors(rows), strict=True):
        colour = _COLOURS[row.model]
        face = colour if row.use == "check" else "none"
        axes.scatter([row.published_tflops], [row.published_tflops / (1 + error)], s=30, facecolors=face, edgecolors=colour)
    ends = [100.0, 2000.0]
    axes.plot(ends, ends, color="#333333", linewidth=1)
    axes.fill_between(ends, [0.8 * end for end in ends], [end / 0.75 for end in ends], color="#8a8f98", alpha=0.15, label="25 %")
    for model, colour in _COLOURS.items():
        axes.scatter([], [], color=colour, label=model)
    axes.scatter([], [], facecolors="none", edgecolors="#333333", label="hollow: fitted on")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="published TFLOP/s/GPU", ylabel="predicted TFLOP/s/GPU")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0] if arguments else "runs/plan_report")
    folder.mkdir(parents=True, exist_ok=True)
    rows, rl_rows = read_rows(), read_rl_rows()
    rl_errors = [row.predicted_s / row.published_s - 1 for row in rl_rows]
    lines = [*summary(rows), _error_line("RL steps, nothing fitted", rl_errors)]
    with (folder / "report.txt").open("w", encoding="utf-8") as file:
        for console in (Console(highlight=False, width=max(140, Console().width)), Console(file=file, width=150)):
            console.print(table(rows), rl_table(rl_rows), measured_table(read_measured_runs()), *lines, sep="\n")
    plot_parity(rows, folder / "parity.png")
    print(f"written: {folder / 'report.txt'}, {folder / 'parity.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
