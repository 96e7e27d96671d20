"""The pictures of one run: reward and entropy over global steps, pass@k before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from megatron_minpro.report.moving_average import moving_average
from megatron_minpro.report.style import BLUE, GREY, ORANGE, save, set_title, style
from megatron_minpro.tracking.metrics_table import HEADLINE

Metrics = Mapping[str, float | None]

_CURVES = (  # file, metric, label, colour
    ("reward", HEADLINE, "mean reward of the trained batch", BLUE),
    ("entropy", "policy/entropy", "policy entropy per token (nats)", ORANGE),
)


def plot_run(
    run_dir: str | Path,
    metrics: Sequence[Metrics],
    *,
    title: str,
    evaluation_before: Mapping[str, float],
    evaluation_after: Mapping[str, float],
) -> list[Path]:
    """Write reward.png, entropy.png and pass_at_k.png into run_dir/plots. A picture without data is not drawn.

    Args:
        run_dir: the run folder.
        metrics: the lines of metrics.jsonl.
        title: of every picture.
        evaluation_before: such as {"pass_at_1": 0.34, "pass_at_8": 0.71}; empty where nothing was measured.
        evaluation_after: the same, after training.

    Returns:
        The paths written.
    """
    folder = Path(run_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        for file, name, label, colour in _CURVES:
            if any(line.get(name) is not None for line in metrics):
                written.append(save(_curve(metrics, name, label=label, colour=colour, title=title), folder / f"{file}.png"))
        if evaluation_before and evaluation_after:
            written.append(save(_bars(evaluation_before, evaluation_after, title=title), folder / "pass_at_k.png"))
    return written


def _curve(metrics: Sequence[Metrics], name: str, *, label: str, colour: str, title: str) -> Figure:
    points = [(line["global_step"], value) for line in metrics if (value := line.get(name)) is not None]
    steps = [float(step or 0) + 1 for step, _ in points]
    values = [value for _, value in points]
    window = max(1, min(5, len(values) // 4))
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1.0, marker="o", markersize=3, label="each step")
    axes.plot(steps, moving_average(values, window), color=colour, linewidth=2.2, label=f"mean of the last {window}")
    if name == HEADLINE and min(values) >= 0.0 and max(values) <= 1.0:
        axes.set_ylim(0.0, 1.0)
    axes.set_xlabel("global step")
    axes.set_ylabel(label)
    set_title(axes, title)
    axes.legend(loc="best")
    return figure


def _bars(before: Mapping[str, float], after: Mapping[str, float], *, title: str) -> Figure:
    measures = [measure for measure in before if measure in after]
    figure, axes = plt.subplots(figsize=(2.6 + 1.3 * len(measures), 4.2))
    width = 0.38
    for offset, values, colour, label in ((-width / 2, before, GREY, "before"), (width / 2, after, BLUE, "after")):
        heights = [values[measure] for measure in measures]
        bars = axes.bar([index + offset for index in range(len(measures))], heights, width=width, color=colour, label=label)
        axes.bar_label(bars, labels=[f"{height:.2f}" for height in heights], padding=2, fontsize=9)
    axes.set_xticks(range(len(measures)), [measure.replace("pass_at_", "pass@") for measure in measures])
    axes.set_ylim(0.0, 1.08)
    axes.set_ylabel("held-out prompts solved")
    axes.grid(axis="x", visible=False)
    set_title(axes, title)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    return figure
