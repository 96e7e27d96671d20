"""The pictures of a study: curves over trained batches, mean over seeds with a band, one panel for each lag or other family.

Every study has reward.png, entropy.png, clipped.png and sample_size.png with a curve for every level of the reference's axis. `figures`
in its file names further ones of chosen cells. A picture without data is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_minpro.report.plots import moving_average
from megatron_minpro.report.statistics import Interval, mean_interval
from megatron_minpro.report.style import save, set_title, style
from megatron_minpro.study.definition import FigureConfig, Study, meets
from megatron_minpro.study.rows import Row
from megatron_minpro.study.summary import Group, families, main_axis, make_groups

PLOTS_FOLDER = "plots"
Curve = Literal["reward", "entropy", "clipped", "sample_size"]
_CURVES: dict[Curve, tuple[tuple[str, ...], str]] = {  # file -> names of curves that are added, label
    "reward": (("reward",), "mean reward of the trained batch"),
    "entropy": (("entropy",), "policy entropy per token (nats)"),
    "clipped": (("clip_hard", "clip_soft"), "share of clipped tokens"),
    "sample_size": (("sample_size",), "effective sample size of the weights"),
}
_COLOURS = [*plt.get_cmap("tab20").colors]  # type: ignore[attr-defined]
_SMOOTHED = 5  # batches of the moving average, at most a fifth of the curve


def plot_study(folder: Path, study: Study, rows: Mapping[str, Row]) -> list[str]:
    """Write the pictures into folder/plots.

    Args:
        folder: of the study.
        study: its definition.
        rows: cell -> row.

    Returns:
        Their paths, relative to the folder.
    """
    target = folder / PLOTS_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    axis = main_axis(study)
    groups = [group for group in make_groups(study, rows) if group.rows]
    colours = {level.name: _COLOURS[index % len(_COLOURS)] for index, level in enumerate(study.levels(axis))}
    figures = [*(FigureConfig(name=curve, curve=curve) for curve in _CURVES), *study.figures]
    written = []
    with style():
        for each in figures:
            chosen = [group for group in groups if meets(each.where, group.levels)]
            figure = _panels(families(study, chosen), axis, each.curve, colours=colours)
            if figure is not None:
                written.append(save(figure, target / f"{each.name}.png"))
    return [str(path.relative_to(folder)) for path in written]


def mean_curve(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[int, Interval]]:
    """(trained batches, mean over seeds of the sum of these curves). A point that a seed lacks is the mean of the others.

    Rows whose curves were thinned otherwise than the first one's are left out: their points lie elsewhere.
    """
    alike = [row for row in rows if row.stride == rows[0].stride]
    found = []
    for index in range(max((len(row.curves[name]) for row in alike for name in names if name in row.curves), default=0)):
        values = []
        for row in alike:
            known = [curve[index] for name in names if (curve := row.curves.get(name)) is not None and index < len(curve)]
            present = [value for value in known if value is not None]
            if present:
                values.append(math.fsum(present))
        if values:
            found.append((1 + index * rows[0].stride, mean_interval(values)))
    return found


def _panels(found: Mapping[str, Sequence[Group]], axis: str, curve: Curve, *, colours: Mapping[str, tuple[float, ...]]) -> Figure | None:
    names, label = _CURVES[curve]
    drawn = {
        title: [(group.levels[axis], points) for group in groups if (points := mean_curve(list(group.rows.values()), names))]
        for title, groups in found.items()
    }
    drawn = {title: curves for title, curves in drawn.items() if curves}
    if not drawn:
        return None
    figure, panels = plt.subplots(1, len(drawn), figsize=(1.6 + 4.6 * len(drawn), 4.2), sharey=True, squeeze=False)
    for panel, (title, curves) in zip(panels[0], drawn.items(), strict=True):
        for level, points in curves:
            _draw(panel, points, label=level, colour=colours[level])
        panel.set_xlabel("trained batches")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        set_title(panel, title or label)
    panels[0][0].set_ylabel(label)
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="center left", bbox_to_anchor=(0.995, 0.5), fontsize=9)
    figure.tight_layout()
    return figure


def _draw(axes: Axes, curve: Sequence[tuple[int, Interval]], *, label: str, colour: tuple[float, ...]) -> None:
    """A moving average of the mean, and of its interval where there are several seeds."""
    steps = [step for step, _ in curve]
    window = max(1, min(_SMOOTHED, len(curve) // 5))
    axes.plot(steps, moving_average([point.mean for _, point in curve], window), color=colour, linewidth=1.8, label=label)
    low = [point.mean if point.low is None else point.low for _, point in curve]
    high = [point.mean if point.high is None else point.high for _, point in curve]
    if low != high:
        axes.fill_between(steps, moving_average(low, window), moving_average(high, window), color=colour, alpha=0.12, linewidth=0)
