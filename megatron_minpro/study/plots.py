"""The pictures of a study: curves over trained batches, mean over seeds with a band, one panel for each lag or other family.

Every study has reward.png, entropy.png, clipped.png and sample_size.png with a curve for every level of the reference's axis. `figures`
in its file names further ones of chosen cells. A picture without data is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_minpro.report.style import save, set_title, style
from megatron_minpro.study.curves import CURVES, Curve, CurveName, smoothed_curve
from megatron_minpro.study.definition import FigureConfig, Study, meets
from megatron_minpro.study.rows import Row
from megatron_minpro.study.summary import Group, families, main_axis, make_groups

PLOTS_FOLDER = "plots"
_COLOURS = [*plt.get_cmap("tab20").colors]  # type: ignore[attr-defined]


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
    figures = [*(FigureConfig(name=curve, curve=curve) for curve in CURVES), *study.figures]
    written = []
    with style():
        for each in figures:
            chosen = [group for group in groups if meets(each.where, group.levels)]
            figure = _panels(families(study, chosen), axis, each.curve, colours=colours)
            if figure is not None:
                written.append(save(figure, target / f"{each.name}.png"))
    return [str(path.relative_to(folder)) for path in written]


def _panels(found: Mapping[str, Sequence[Group]], axis: str, name: CurveName, *, colours: Mapping[str, tuple[float, ...]]) -> Figure | None:
    _, label = CURVES[name]
    drawn = {
        title: [(group.levels[axis], curve) for group in groups if (curve := smoothed_curve(list(group.rows.values()), name))]
        for title, groups in found.items()
    }
    drawn = {title: curves for title, curves in drawn.items() if curves}
    if not drawn:
        return None
    figure, panels = plt.subplots(1, len(drawn), figsize=(1.6 + 4.6 * len(drawn), 4.2), sharey=True, squeeze=False)
    for panel, (title, curves) in zip(panels[0], drawn.items(), strict=True):
        for level, curve in curves:
            _draw(panel, curve, label=level, colour=colours[level])
        panel.set_xlabel("trained batches")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        set_title(panel, title or label)
    panels[0][0].set_ylabel(label)
    lines = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="center left", bbox_to_anchor=(0.995, 0.5), fontsize=9)
    figure.tight_layout()
    return figure


def _draw(axes: Axes, curve: Curve, *, label: str, colour: tuple[float, ...]) -> None:
    axes.plot(curve.batches, curve.mean, color=colour, linewidth=1.8, label=label)
    if curve.has_band:
        axes.fill_between(curve.batches, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
