"""Tables for people (Markdown) and programs (CSV, JSON): pass@1 of all benchmarks beside each other, and pass@k of each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.evaluation.grading import Disagreement
from megatron_minpro.evaluation.scores import Average, AverageCurve, Counts, pass_at_k_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """`rows` are records with the same keys; `markdown` is the same content laid out for reading."""

    rows: list[dict[str, Any]]
    markdown: str


def scores_table(model: str, all_counts: Sequence[Counts], average: Average) -> Table:
    """One line: pass@1 of every benchmark and their mean, in percent, with the 95% interval (the layout of the paper's table 1)."""
    rows = []
    cells = []
    for counts in all_counts:
        first = pass_at_k_table(counts)[0]
        rows.append({"model": model, "benchmark": counts.title, **_numbers(first.mean, first.low, first.high)})
        cells.append(_cell(first.mean, first.low, first.high))
    titles = [f"{counts.title} (avg@{counts.num_samples[0]})" for counts in all_counts]
    if len(all_counts) > 1:
        rows.append({"model": model, "benchmark": "Average", **_numbers(average.mean, average.low, average.high)})
        cells.append(_cell(average.mean, average.low, average.high))
        titles.append("Average")
    return Table(rows=rows, markdown=markdown_table(["model", *titles], [[model, *cells]]))


def curves_table(model: str, all_counts: Sequence[Counts]) -> Table:
    """pass@k in percent: a line per benchmark and estimator, a column per k (the layout of the paper's table 4)."""
    rows, lines = [], []
    ks = sorted({k for counts in all_counts for k in counts.ks})
    for counts in all_counts:
        entries = pass_at_k_table(counts)
        for entry in entries:
            rows.append(
                {
                    "model": model,
                    "benchmark": counts.title,
                    "estimator": entry.estimator,
                    "k": entry.k,
                    **_numbers(entry.mean, entry.low, entry.high),
                    "problems": entry.num_problems,
                    "samples_per_problem": counts.num_samples[0],
                }
            )
        for estimator in dict.fromkeys(entry.estimator for entry in entries):
            cells = {entry.k: _cell(entry.mean, entry.low, entry.high) for entry in entries if entry.estimator == estimator}
            lines.append([counts.title, estimator, *(cells.get(k, "") for k in ks)])
    return Table(rows=rows, markdown=markdown_table(["benchmark", "estimator", *(f"pass@{k}" for k in ks)], lines))


def average_curves_table(model: str, titles: Sequence[str], curves: Sequence[AverageCurve]) -> Table:
    """Mean pass@k of several benchmarks in percent: a column per k, and the average over k (the layout of the paper's table 2).

    Args:
        model: name of the model.
        titles: of the benchmarks.
        curves: one per estimator.
    """
    over = ", ".join(titles)
    rows, lines = [], []
    for curve in curves:
        columns = {**{f"pass@{k}": average for k, average in curve.by_k.items()}, "Average over k": curve.over_k}
        rows += [
            {"model": model, "benchmarks": over, "estimator": curve.estimator, "measure": name, **asdict(average)}
            for name, average in columns.items()
        ]
        lines.append(
            [f"mean of {over}", curve.estimator, *(_cell(average.mean, average.low, average.high) for average in columns.values())]
        )
    header = ["benchmarks", "estimator", *dict.fromkeys(row["measure"] for row in rows)]
    return Table(rows=rows, markdown=markdown_table(header, lines))


def disagreements_table(found: Sequence[Disagreement]) -> Table:
    """Answers on which math-verify and comparing text and digits differ, most frequent first."""
    header = ["benchmark", "problem_id", "label", "answer", "plain", "math_verify", "counted_as", "samples"]
    rows = [asdict(item) for item in found]
    lines = [[_shown(row[name]) for name in header] for row in rows]
    return Table(rows=rows, markdown=markdown_table(header, lines))


def write_table(folder: Path, name: str, table: Table) -> None:
    """name.md, name.csv and name.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    if table.rows:
        writer = csv.DictWriter(text, fieldnames=list(table.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.rows)
    for suffix, content in (
        ("md", table.markdown),
        ("csv", text.getvalue()),
        ("json", json.dumps(table.rows, indent=2, ensure_ascii=False) + "\n"),
    ):
        write_atomically(folder / f"{name}.{suffix}", content.encode("utf-8", "backslashreplace"), durable=False)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded, so that it reads well as plain text, too."""
    all_lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *lines)]
    widths = [max(len(line[column]) for line in all_lines) for column in range(len(header))]
    drawn = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in all_lines]
    drawn.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(drawn) + "\n"


def _numbers(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def _cell(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
