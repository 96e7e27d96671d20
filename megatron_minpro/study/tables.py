"""report.md, table.csv and table.json of a study: means over seeds, comparisons, and what failed or is missing."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.evaluation.tables import markdown_table
from megatron_minpro.report import measures as rules
from megatron_minpro.report.statistics import Interval
from megatron_minpro.study.definition import Study
from megatron_minpro.study.rows import Row
from megatron_minpro.study.summary import COMPARED, Comparison, Group, compare, families, make_groups

# Measure -> column of the report, in order.
SHOWN = {
    "pass_at_1_after": "pass@1",
    "pass_at_1_best": "best pass@1",
    "pass_at_8_after": "pass@8",
    "pass_at_8_best": "best pass@8",
    **{
        name: rules.LABELS[name]
        for name in ("reward_last", "reward_best", "reward_area", "entropy_last", "sample_size", "clipped", "seconds")
    },
}
REPORT_FILE = "report.md"
Table = tuple[list[str], list[list[str]]]  # header, lines


def write_tables(folder: Path, study: Study, rows: Mapping[str, Row], *, total: int, pictures: Sequence[str] = ()) -> str:
    """Write the three files. Combinations without a row are left out.

    Args:
        folder: of the study.
        study: its definition.
        rows: cell -> row.
        total: cells of the study.
        pictures: paths below the folder, in order.

    Returns:
        The text of the report.
    """
    groups = [group for group in make_groups(study, rows) if group.rows or group.failed]
    comparisons = compare(study, groups)
    text = _report(study, groups, comparisons, rows, total, pictures)
    write_atomically(folder / REPORT_FILE, text, durable=False)
    records = [_record(group, comparisons) for group in groups]
    write_atomically(folder / "table.json", json.dumps(records, indent=2) + "\n", durable=False)
    columns = list(dict.fromkeys(name for record in records for name in record))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_atomically(folder / "table.csv", table.getvalue(), durable=False)
    return text


def _report(
    study: Study,
    groups: Sequence[Group],
    comparisons: Sequence[Comparison],
    rows: Mapping[str, Row],
    total: int,
    pictures: Sequence[str],
) -> str:
    done = sum(len(group.rows) for group in groups)
    failed = [row for row in rows.values() if row.status == "failed"]
    parts = [
        f"# {study.name}\n",
        f"{done} of {total} cells are done, {len(failed)} failed. Base: `{study.base}`. Seeds: {', '.join(map(str, study.seeds))}.\n",
        f"{HOW_MEASURED}\n",
    ]
    for family, members in families(study, groups).items():
        along = along_the_response(members)
        parts += [f"## {family}\n" if family else "", markdown_table(*means(members)), "" if along is None else markdown_table(*along)]
    if comparisons:
        axis, level = next(iter(study.reference.items()))
        parts += [f"## Differences from {axis} {level}\n", f"{how_compared(study)}\n"]
        for family, members in families(study, groups).items():
            table = differences([each for each in comparisons if each.group in members], axis)
            if table is not None:
                parts += [f"### {family}\n" if family else "", markdown_table(*table)]
    if failed:
        parts += ["## Failed cells\n", "".join(f"- {row.cell}: {row.error}\n" for row in failed)]
    if pictures:
        parts += ["## Curves\n", "".join(f"![{Path(path).stem}]({path})\n" for path in pictures)]
    return "\n".join(part for part in parts if part)


HOW_MEASURED = (
    "Mean over seeds ± half of the 95 % t interval. `collapsed`: seeds whose mean reward over the last window lies more than "
    f"{rules.COLLAPSE} below that of their best window. The window is a tenth of the batches, at least {rules.LEAST_WINDOW}. "
    "`reward, area` is the mean over all trained batches. megatron_minpro/report/measures.py defines every column."
)


def how_compared(study: Study) -> str:
    """What the numbers of `differences` are."""
    axis, _ = next(iter(study.reference.items()))
    return (
        "Paired by seed: mean difference with its 95 % t interval, p of the two-sided paired t test after Holm's correction over the "
        f"levels of `{axis}` in one table, and the seeds above and below the reference. With {len(study.seeds)} seeds an exact "
        f"sign-flip test has no p below {2.0 ** (1 - len(study.seeds)):.4g}. * marks p < 0.05."
    )


def means(groups: Sequence[Group]) -> Table:
    """Means over seeds, a line a group."""
    shown = [measure for measure in SHOWN if any(group.values(measure) for group in groups)]
    header = ["cells", "seeds", *(SHOWN[measure] for measure in shown), "collapsed"]
    lines = []
    for group in groups:
        seeds = str(len(group.rows)) + (f" ({group.failed} failed)" if group.failed else "")
        fallen = group.values("collapsed")
        collapsed = f"{sum(fallen.values()):.0f} of {len(fallen)}" if fallen else "-"
        lines.append([group.name, seeds, *(_shown(group.interval(measure), measure) for measure in shown), collapsed])
    return header, lines


def along_the_response(groups: Sequence[Group]) -> Table | None:
    """Weight and smallest earlier ratio by place in the response; None where no row has them."""
    weight, minimum = rules.BY_PLACE
    stretches = {name: int(name.split("_")[1]) for group in groups for row in group.rows.values() for name in _stretches(row, weight)}
    if not stretches:
        return None
    ordered = sorted(stretches, key=lambda name: stretches[name])
    lines = []
    for group in groups:
        pairs = [(group.interval(f"{weight}/{name}"), group.interval(f"{minimum}/{name}")) for name in ordered]
        lines.append([group.name, *("-" if w is None or m is None else f"{w.mean:.2f} / {math.exp(m.mean):.2f}" for w, m in pairs)])
    return ["weight / smallest earlier ratio", *(name.replace("_", " ") for name in ordered)], lines


def _stretches(row: Row, group: str) -> list[str]:
    return [name.removeprefix(f"{group}/") for name in row.measures if name.startswith(f"{group}/")]


def differences(comparisons: Sequence[Comparison], axis: str) -> Table | None:
    """Differences from the reference, a line a group; None where there is none."""
    measures = [measure for measure in COMPARED if any(each.measure == measure for each in comparisons)]
    if not measures:
        return None
    lines = []
    for group in dict.fromkeys(each.group.name for each in comparisons):
        mine = {each.measure: each for each in comparisons if each.group.name == group}
        level = next(iter(mine.values())).group.levels[axis]
        lines.append([level, *(_difference(mine.get(measure)) for measure in measures)])
    return [axis, *(SHOWN[measure] for measure in measures)], lines


def _difference(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    interval, difference = comparison.difference.interval, comparison.difference
    signs = f"{difference.positive}+ {difference.negative}-"
    if interval.low is None or interval.high is None or comparison.holm is None:
        return f"{interval.mean:+.3f} ({signs})"
    star = " *" if comparison.holm < 0.05 else ""
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}] p {comparison.holm:.2g} ({signs}){star}"


def _shown(interval: Interval | None, measure: str) -> str:
    if interval is None:
        return "-"
    digits = 0 if measure == "seconds" else 3
    if interval.high is None:
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f} ± {interval.high - interval.mean:.{digits}f}"


def _record(group: Group, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "cells": group.name,
        **group.levels,
        "seeds": len(group.rows),
        "failed": group.failed,
        "missing": group.missing,
    }
    for measure in dict.fromkeys(name for row in group.rows.values() for name in row.measures):
        interval = group.interval(measure)
        assert interval is not None
        record |= {measure: interval.mean, f"{measure}_low": interval.low, f"{measure}_high": interval.high}
    for each in comparisons:
        if each.group.name == group.name:
            name, interval = f"{each.measure}_difference", each.difference.interval
            record |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
            record |= {f"{name}_p": each.difference.p, f"{name}_p_holm": each.holm}
            record |= {f"{name}_positive": each.difference.positive, f"{name}_negative": each.difference.negative}
    return record
