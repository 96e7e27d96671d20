"""The pictures of a study; one without data is not drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_minpro.report.style import COLOURS, GREY, save, set_powers_of_two, set_title, style
from megatron_minpro.scaling.rows import Row
from megatron_minpro.scaling.tables import efficiency, memory_of, pairs, series
from parallel.planner.hardware import Hardware

_KINDS = (("measured", "-"), ("predicted", "--"))
_MANY = [*plt.get_cmap("tab20").colors]  # type: ignore[attr-defined]  # one per part of memory or time
_LEAST_SHARE = 0.005  # parts below it of every bar are not drawn


def plot_study(folder: Path, rows: Sequence[Row], hardware: Hardware) -> list[Path]:
    """Write the pictures into folder/plots; returns their paths."""
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    usable = [row for row in rows if row.step_s is not None]
    with style():
        figures = {
            "throughput": _curves(rows, hardware, relative=False),
            "efficiency": _curves(rows, hardware, relative=True),
            "memory": _memory(usable, hardware),
            "step_time": _step_time(usable),
            "predicted_and_measured": _parity(rows),
        }
        return [save(figure, target / f"{name}.png") for name, figure in figures.items() if figure is not None]


def _curves(rows: Sequence[Row], hardware: Hardware, *, relative: bool) -> Figure | None:
    """Throughput per rank, or relative to the smallest layout, against ep; one curve per kind, scaling and, where ep has several, ranks."""
    figure, axes = plt.subplots(figsize=(7.2, 4.4))
    several = any(len({row.world_size for row in rows if row.ep == ep}) > 1 for ep in {row.ep for row in rows})
    drawn = 0
    for kind, line in _KINDS:
        for scaling in ("strong", "weak"):
            curve = series(rows, kind, scaling)
            for world_size in sorted({row.world_size for row in curve}) if several else [None]:
                mine = sorted((row for row in curve if world_size in (None, row.world_size)), key=lambda row: row.ep)
                values = [(efficiency(rows, row, scaling) if relative else row.tokens_per_s_per_gpu) or 0.0 for row in mine]
                if mine:
                    label = f"{kind}, {scaling}" + (f", {world_size} ranks" if world_size else "")
                    axes.plot([row.ep for row in mine], values, line, marker="o", color=COLOURS[drawn % len(COLOURS)], label=label)
                    drawn += 1
    if not drawn:
        plt.close(figure)
        return None
    sizes = sorted({row.ep for row in rows})
    set_powers_of_two(axes, sizes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("expert parallelism")
    axes.set_ylabel("throughput per rank, of the smallest layout's" if relative else "tokens/s per rank")
    etp = max(row.etp or 1 for row in rows)
    boundary = hardware.nvlink_domain / etp
    if sizes[0] <= boundary < sizes[-1]:
        axes.axvline(boundary * 2**0.5, color=GREY, linestyle=":", linewidth=1.5, label=f"node boundary ({hardware.name})")
    set_title(axes, rows[0].model)
    axes.legend(fontsize=9)
    return figure


def _names(rows: Sequence[Row]) -> list[str]:
    return [f"ep {row.ep}\n{row.world_size} ranks\n{row.sequences} seq." for row in rows]


def _stack(
    axes: Axes, bars: Sequence[dict[str, float]], places: Sequence[float], *, width: float, colours: dict[str, tuple[float, ...]]
) -> None:
    bottoms = [0.0] * len(bars)
    largest = max(sum(bar.values()) for bar in bars)
    for name in dict.fromkeys(name for bar in bars for name in bar):
        heights = [bar.get(name, 0.0) for bar in bars]
        if max(heights) > _LEAST_SHARE * largest:
            colour = colours.setdefault(name, _MANY[len(colours) % len(_MANY)])
            axes.bar(places, heights, width, bottom=bottoms, color=colour, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]


def _finish(axes: Axes, rows: Sequence[Row], *, label: str) -> None:
    axes.set_xticks(range(len(rows)), _names(rows), fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(label)
    set_title(axes, rows[0].model)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _memory(rows: Sequence[Row], hardware: Hardware) -> Figure | None:
    plans = [row for row in rows if row.kind == "predicted"]
    if not plans:
        return None
    figure, axes = plt.subplots(figsize=(3.6 + 0.9 * len(plans), 4.4))
    _stack(axes, [dict(plan.memory_gb) for plan in plans], range(len(plans)), width=0.6, colours={})
    found = {row.key: memory_of(row) for row in rows if row.kind == "measured"}
    points = [(place, found[plan.key]) for place, plan in enumerate(plans) if found.get(plan.key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "D", color="#111111", markersize=5, label="measured")
    limit = 1e-9 * hardware.usable_bytes
    fullest = max(plan.predicted_total_gb or 0.0 for plan in plans)
    if fullest > 0.1 * limit:
        axes.axhline(limit, color="#c0392b", linewidth=1.5, label=f"{hardware.name} holds {limit:.0f} GB")
    else:  # the line would leave nothing to see of the bars
        axes.plot([], [], color="#c0392b", label=f"{hardware.name} holds {limit:.0f} GB (above)")
    _finish(axes, plans, label="GB on the fullest rank")
    return figure


def _step_time(rows: Sequence[Row]) -> Figure | None:
    """Predicted parts, and beside them, where it was measured, what each kind of communication keeps a rank waiting."""
    plans = [row for row in rows if row.kind == "predicted"]
    if not plans:
        return None
    figure, axes = plt.subplots(figsize=(4.2 + 0.9 * len(plans), 4.4))
    found = {row.key: row for row in rows if row.kind == "measured"}
    width = 0.38 if found else 0.6
    colours: dict[str, tuple[float, ...]] = {}
    _stack(
        axes,
        [dict(plan.time_s) for plan in plans],
        [place - (width / 2 if found else 0) for place in range(len(plans))],
        width=width,
        colours=colours,
    )
    both = [(place, found[plan.key]) for place, plan in enumerate(plans) if plan.key in found]
    if both:
        bars = []
        for _, row in both:
            assert row.step_s is not None
            share = 0.0 if row.explained_s is None else row.step_s / row.explained_s
            waiting = {f"waiting: {kind}": seconds * share for kind, seconds in row.exposed_s.items()}
            bars.append({"measured, not waiting": max(0.0, row.step_s - sum(waiting.values())), **waiting})
        _stack(axes, bars, [place + width / 2 for place, _ in both], width=width, colours=colours)
    what = " (left: predicted, right: measured)" if both else ""
    _finish(axes, plans, label=f"s of one optimizer step{what}")
    return figure


def _parity(rows: Sequence[Row]) -> Figure | None:
    found = pairs(rows)
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(5.0, 4.8))
    for index, ep in enumerate(sorted({row.ep for _, row in found})):
        mine = [(row.step_s or 0.0, plan.step_s or 0.0) for plan, row in found if row.ep == ep]
        axes.scatter([x for x, _ in mine], [y for _, y in mine], s=36, color=COLOURS[index % len(COLOURS)], label=f"ep {ep}")
    values = [value for plan, row in found for value in (plan.step_s, row.step_s) if value is not None]
    ends = [0.7 * min(values), 1.4 * max(values)]
    axes.plot(ends, ends, color="#333333", linewidth=1)
    axes.fill_between(ends, [0.75 * end for end in ends], [1.25 * end for end in ends], color=GREY, alpha=0.15, label="25 %")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured s of a step", ylabel="predicted s of a step")
    axes.legend(fontsize=9)
    return figure
