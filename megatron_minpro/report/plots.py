"""The pictures at the end of a run: reward and entropy over global steps, pass@k before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from checkpoints_convert.atomic_files import write_atomically

Metrics = Mapping[str, float | None]

_BLUE, _ORANGE, _GREY = "#2a5db0", "#d9722b", "#8a8f98"
COLOURS = (_BLUE, _ORANGE, "#3a8f5c", "#8a4fa3", _GREY)  # one per curve
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "legend.frameon": False,
}


def plot_run(
    run_dir: str | Path,
    metrics: Sequence[Metrics],
    *,
    title: str,
    evaluation_before: Mapping[str, float],
    evaluation_after: Mapping[str, float],
) -> list[Path]:
    """Write reward.png, entropy.png and pass_at_k.png into run_dir/plots; a picture without data is not drawn.

    metrics: the lines of metrics.jsonl. evaluation_*: e.g. {"pass_at_1": 0.34, "pass_at_8": 0.71}. Returns the paths written.
    """
    folder = Path(run_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    curves = (("reward", "mean reward of the sampled batch", _BLUE), ("entropy", "policy entropy per token (nats)", _ORANGE))
    for key, label, colour in curves:
        if any(line.get(key) is not None for line in metrics):
            with plt.rc_context(STYLE):
                written.append(save(_curve(metrics, key, label=label, colour=colour, title=title), folder / f"{key}.png"))
    if evaluation_before and evaluation_after:
        with plt.rc_context(STYLE):
            written.append(save(_bars(evaluation_before, evaluation_after, title=title), folder / "pass_at_k.png"))
    return written


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 before it: same length, never looks ahead."""
    if window < 1:
        raise ValueError(f"moving average: window = {window}, expected at least 1")
    averages = []
    for index in range(len(values)):
        recent = values[max(0, index - window + 1) : index + 1]
        averages.append(sum(recent) / len(recent))
    return averages


def _curve(metrics: Sequence[Metrics], key: str, *, label: str, colour: str, title: str) -> Figure:
    points = [(line["global_step"], value) for line in metrics if (value := line.get(key)) is not None]
    steps = [float(step or 0) + 1 for step, _ in points]
    values = [value for _, value in points]
    window = max(1, min(5, len(values) // 4))
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1.0, marker="o", markersize=3, label="each step")
    axes.plot(steps, moving_average(values, window), color=colour, linewidth=2.2, label=f"mean of the last {window}")
    if key == "reward" and min(values) >= 0.0 and max(values) <= 1.0:
        axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("global step")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=11, color="#333333")
    axes.legend(loc="best")
    return figure


def _bars(before: Mapping[str, float], after: Mapping[str, float], *, title: str) -> Figure:
    measures = [measure for measure in before if measure in after]
    figure, axes = plt.subplots(figsize=(2.6 + 1.3 * len(measures), 4.2))
    width = 0.38
    for offset, values, colour, label in ((-width / 2, before, _GREY, "before"), (width / 2, after, _BLUE, "after")):
        heights = [values[measure] for measure in measures]
        bars = axes.bar([index + offset for index in range(len(measures))], heights, width=width, color=colour, label=label)
        axes.bar_label(bars, labels=[f"{height:.2f}" for height in heights], padding=2, fontsize=9)
    axes.set_xticks(range(len(measures)), [measure.replace("pass_at_", "pass@") for measure in measures])
    axes.set_ylim(0.0, 1.08)
    axes.set_ylabel("held-out prompts solved")
    axes.grid(axis="x", visible=False)
    axes.set_title(title, loc="left", fontsize=11, color="#333333")
    _legend_below(axes)
    return figure


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all, and close it."""
    image = io.BytesIO()
    figure.savefig(image, format="png", bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, image.getvalue(), durable=False)
    return path
