"""A rehearsal as pictures: memory over the run, and the peak of every phase, both stacked by kind."""

from __future__ import annotations

from pathlib import Path

from parallel.rehearsal.ledger_kinds import KINDS
from parallel.rehearsal.result import RehearsalResult
from parallel.rehearsal.tables import GB

_COLOURS = dict(zip(KINDS, ("#4c72b0", "#55a868", "#8172b3", "#937860", "#dd8452", "#c44e52"), strict=True))


def plot(result: RehearsalResult, path: Path, *, limit_bytes: float) -> None:
    """Write a PNG. limit_bytes: what fits on the device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in KINDS if any(phase.by_kind.get(kind) for phase in result.phases)]
    figure, (over_time, by_phase) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 1), layout="constrained")
    points = [point for phase in result.phases for point in phase.timeline]
    stacks = [[point[KINDS.index(kind)] / GB for point in points] for kind in kinds]
    over_time.stackplot(range(len(points)), *stacks, labels=kinds, colors=[_COLOURS[kind] for kind in kinds])
    start = 0
    for phase in result.phases:
        over_time.axvline(start, color="black", linewidth=0.5)
        over_time.text(start, 1.01, phase.name, transform=over_time.get_xaxis_transform(), fontsize=8)
        start += len(phase.timeline)
    over_time.set(xlabel="allocations and frees, in order", ylabel="GB", xticks=[], xlim=(0, max(1, len(points) - 1)))
    over_time.legend(loc="lower right", fontsize=8)

    names, bottom = [phase.name for phase in result.phases], [0.0] * len(result.phases)
    for kind in kinds:
        heights = [phase.by_kind.get(kind, 0) / GB for phase in result.phases]
        by_phase.bar(names, heights, bottom=bottom, color=_COLOURS[kind])
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    by_phase.set(ylabel="GB at the peak")
    by_phase.tick_params(axis="x", labelrotation=30)
    for axes in (over_time, by_phase):
        if limit_bytes < 1.5 * GB * max(bottom, default=0.0):
            axes.axhline(limit_bytes / GB, color="black", linestyle="--", linewidth=1)
    figure.suptitle(f"{result.request.model_name}, rank {result.request.rank} of {result.request.layout.world_size}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
