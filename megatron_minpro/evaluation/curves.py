"""The picture: pass@k over k, a panel per benchmark, both estimators, with the interval of the unbiased one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt

from megatron_minpro.evaluation.scores import Counts, pass_at_k_table
from megatron_minpro.report.pass_at_k import PassAtK
from megatron_minpro.report.style import COLOURS, save, set_powers_of_two, set_title, style


def plot_curves(path: Path, runs: Mapping[str, Sequence[Counts]]) -> None:
    """runs: name -> the counts of its benchmarks. Benchmarks that not every run has are drawn for those that have them."""
    names = list(dict.fromkeys(counts.benchmark for benchmarks in runs.values() for counts in benchmarks))
    with style():
        columns = min(len(names), 4)
        lines = -(-len(names) // columns)
        figure, panels = plt.subplots(lines, columns, figsize=(4.2 * columns + 0.6, 3.6 * lines + 0.4), squeeze=False)
        for panel, name in zip(panels.flat, names, strict=False):
            for colour, (run, benchmarks) in zip(COLOURS, runs.items(), strict=False):
                for counts in benchmarks:
                    if counts.benchmark == name:
                        set_title(panel, counts.title)
                        _draw(panel, pass_at_k_table(counts), colour=colour, label=run if len(runs) > 1 else "")
            panel.set_ylim(0.0, 1.02)
            panel.set_xlabel("k")
            panel.set_ylabel("pass@k")
            panel.legend(loc="lower right", fontsize=8)
        for panel in panels.flat[len(names) :]:
            panel.set_visible(False)
        figure.tight_layout()
        save(figure, path)


def _draw(panel: plt.Axes, entries: Sequence[PassAtK], *, colour: str, label: str) -> None:
    for estimator, line in (("unbiased", "-"), ("bootstrap", "--")):
        chosen = [entry for entry in entries if entry.estimator == estimator]
        ks = [entry.k for entry in chosen]
        panel.plot(
            ks,
            [entry.mean for entry in chosen],
            line,
            color=colour,
            linewidth=2.0 if estimator == "unbiased" else 1.4,
            marker="o",
            markersize=3,
            label=f"{label} {estimator}".strip(),
        )
        if estimator == "unbiased":
            panel.fill_between(ks, [entry.low for entry in chosen], [entry.high for entry in chosen], color=colour, alpha=0.15, linewidth=0)
    set_powers_of_two(panel, [entry.k for entry in entries])
