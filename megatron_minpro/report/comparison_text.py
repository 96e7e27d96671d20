"""A comparison for people, in a console of any width, and as plain values for programs.

Runs are numbered, because names are long: a table has a line for each run or group and a few columns of numbers, so that it fits into
80 columns. Names that do not fit end in an ellipsis in the tables; the list of runs has them whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_minpro.report.comparison import Comparison, GroupDifference
from megatron_minpro.report.measure_text import bounds_text, label_of, mean_text, number_text, shown_blocks

_PIPE_WIDTH = 200  # columns where no terminal says how many it has


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """All of it as plain values, for JSON."""
    return {
        "runs": [
            {
                "label": run.label,
                "path": str(run.view.path),
                "seed": run.view.seed,
                "state": run.view.state,
                "measures": dict(run.measures),
                "notes": list(run.view.notes),
            }
            for run in comparison.runs
        ],
        "settings": {key: list(values) for key, values in comparison.differing.items()},
        "groups": [
            {
                "name": group.name,
                "runs": [run.label for run in group.runs.values()],
                "measures": {
                    measure: asdict(interval) for measure in comparison.measures if (interval := group.interval(measure)) is not None
                },
            }
            for group in comparison.groups
        ],
        "reference": comparison.reference.name,
        "differences": [{"group": each.group.name, "measure": each.measure, **asdict(each.difference)} for each in comparison.differences],
        "notes": list(comparison.notes),
    }


def make_console(out: Any) -> Console:
    """As wide as the terminal; wide enough for every name where `out` is a pipe or a file."""
    console = Console(file=out, highlight=False)
    return console if console.is_terminal else Console(file=out, highlight=False, width=_PIPE_WIDTH)


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Runs, settings that differ, measures, groups of seeds, differences from the reference, and what is missing."""
    numbers = {run.label: number for number, run in enumerate(comparison.runs, start=1)}
    console.print(_runs(comparison))
    if comparison.differing:
        _heading(console, "Settings that differ")
        console.print(_settings(comparison))
    blocks = shown_blocks(comparison.measures)
    for block in blocks:
        lines = [
            (f"{numbers[run.label]} {run.label}", [number_text(run.measures.get(name), name) for name in block]) for run in comparison.runs
        ]
        _print_numbers(console, "run", block, lines)
    if any(len(group.runs) > 1 for group in comparison.groups):
        _heading(console, "Mean over seeds ± half of the 95 % t interval")
        for block in blocks:
            intervals = [(group.name, [mean_text(group.interval(name), name) for name in block]) for group in comparison.groups]
            _print_numbers(console, "group", block, intervals)
    shown = [name for block in blocks for name in block]
    for group in comparison.groups:
        mine = {each.measure: each for each in comparison.differences if each.group is group}
        if mine:
            shared = len(group.runs.keys() & comparison.reference.runs.keys())
            _heading(console, f"{group.name} minus {comparison.reference.name}, {'seed by seed' if shared > 1 else 'one pair of runs'}")
            console.print(_differences([mine[name] for name in shown if name in mine]))
    if comparison.notes:
        _heading(console, "Notes")
        for note in comparison.notes:
            console.print(Text(note))


def _heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def _runs(comparison: Comparison) -> Table:
    table = _table("", "run", "seed", "state", "steps")
    for number, run in enumerate(comparison.runs, start=1):
        seed = "-" if run.view.seed is None else str(run.view.seed)
        table.add_row(str(number), Text(run.label, overflow="fold"), seed, run.view.state, str(len(run.view.metrics)))
    return table


def _settings(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True, header_style="dim")
    table.add_column("value: numbers of runs", header_style="dim")
    for key, values in comparison.differing.items():
        runs: dict[str, list[int]] = {}
        for number, (value, run) in enumerate(zip(values, comparison.runs, strict=True), start=1):
            known = "-" if run.view.settings else "unknown"  # -: this run has no such setting
            shown = known if key not in run.view.settings else value if isinstance(value, str) else json.dumps(value)
            runs.setdefault(shown, []).append(number)
        table.add_row(Text(key), Text("\n".join(f"{value}: {_ranges(numbers)}" for value, numbers in runs.items())))
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> 1-3, 7. Ascending."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _print_numbers(console: Console, who: str, measures: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> None:
    console.print(Text(""))
    table = _table(who, *(label_of(name) for name in measures))
    for name, cells in lines:
        table.add_row(Text(name, overflow="ellipsis", no_wrap=True), *cells)
    console.print(table)


def _differences(differences: Sequence[GroupDifference]) -> Table:
    table = _table("measure", "difference", "95 % interval", "p", "pairs", "above", "below")
    for each in differences:
        interval, p = each.difference.interval, each.difference.p
        table.add_row(
            label_of(each.measure),
            number_text(interval.mean, each.measure, sign="+"),
            bounds_text(interval, each.measure),
            "-" if p is None else f"{p:.2g}",
            *(str(count) for count in (interval.count, each.difference.positive, each.difference.negative)),
        )
    return table


def _table(first: str, *others: str) -> Table:
    """Names on the left, numbers on the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, header_style="dim")
    for other in others:
        names = other in ("run", "state")
        table.add_column(other, justify="left" if names else "right", no_wrap=other != "run", header_style="dim")
    return table
