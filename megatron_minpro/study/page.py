"""report.html of a study: curves that can be chosen, and the tables of report.md, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.report.page.charts.chart import CONFIG, Spec, legend, line_style, value_axis
from megatron_minpro.report.page.document import asset, chart_library, render
from megatron_minpro.report.page.rounded import rounded
from megatron_minpro.study import tables
from megatron_minpro.study.curves import CURVES, smoothed_curve
from megatron_minpro.study.definition import Study
from megatron_minpro.study.rows import Row
from megatron_minpro.study.summary import Group, compare, families, main_axis, make_groups

PAGE_FILE = "report.html"
_FIRST_SHOWN = 6  # curves at the beginning; more hide each other
_POINTS = "points"  # the dataset


def write_study_page(folder: Path, study: Study, rows: Mapping[str, Row], *, total: int) -> Path:
    """Write folder/report.html, whole or not at all.

    Args:
        folder: of the study.
        study: its definition.
        rows: cell -> row.
        total: cells of the study.

    Returns:
        The path.
    """
    path = folder / PAGE_FILE
    write_atomically(path, study_page(study, rows, total=total), durable=False)
    return path


def study_page(study: Study, rows: Mapping[str, Row], *, total: int) -> str:
    """The page of these rows. Combinations without a row are left out."""
    axis = main_axis(study)
    groups = [group for group in make_groups(study, rows) if group.rows or group.failed]
    found = families(study, groups)
    levels = [level.name for level in study.levels(axis)]
    compared = compare(study, groups)
    return render(
        asset("page.html.j2", package=__package__),
        scripts=[chart_library(), asset("base.js"), asset("charts.js"), asset("page.js", package=__package__)],
        style=asset("page.css") + asset("page.css", package=__package__),
        data={"config": CONFIG, "spec": _spec(levels), "curves": _curves(found, axis), "shown": _first_shown(study, levels)},
        name=study.name,
        facts=_facts(study, groups, total),
        axis=axis,
        levels=legend(levels),
        curves={name: label for name, (_, label) in CURVES.items()},
        families=[
            {
                "title": title,
                "tables": [tables.means(members), tables.along_the_response(members)],
                "differences": tables.differences([each for each in compared if each.group in members], axis),
            }
            for title, members in found.items()
        ],
        how_measured=tables.HOW_MEASURED,
        how_compared=tables.how_compared(study) if compared else None,
        reference=next(iter(study.reference.values()), None),
        failed=[(row.cell, row.error) for row in rows.values() if row.status == "failed"],
    )


def _facts(study: Study, groups: Sequence[Group], total: int) -> dict[str, str]:
    done, failed = sum(len(group.rows) for group in groups), sum(group.failed for group in groups)
    return {
        "cells": f"{done} of {total} done" + (f", {failed} failed" if failed else ""),
        "seeds": ", ".join(map(str, study.seeds)),
        "base": study.base,
        **{f"reference {axis}": str(level) for axis, level in study.reference.items()},
    }


def _first_shown(study: Study, levels: Sequence[str]) -> list[str]:
    """All levels, or where these are many the reference and the first others."""
    if len(levels) <= _FIRST_SHOWN:
        return list(levels)
    reference = [str(level) for level in study.reference.values()]
    return [*reference, *(level for level in levels if level not in reference)][:_FIRST_SHOWN]


def _curves(found: Mapping[str, Sequence[Group]], axis: str) -> dict[str, list[dict[str, list[list[float | None]]]]]:
    """Curve -> for each family: level -> points [trained batches, mean, low, high]. A level without the curve is left out."""
    drawn: dict[str, list[dict[str, Any]]] = {}
    for name in CURVES:
        drawn[name] = []
        for groups in found.values():
            curves = {group.levels[axis]: smoothed_curve(list(group.rows.values()), name) for group in groups if group.rows}
            drawn[name].append(
                {
                    level: [[batches, *map(rounded, point)] for batches, *point in zip(c.batches, c.mean, c.low, c.high, strict=True)]
                    for level, c in curves.items()
                    if c is not None
                }
            )
    return drawn


def _spec(levels: Sequence[str]) -> Spec:
    """Lines with bands over trained batches. page.js gives the points and one range of values for all families."""
    x: Spec = {
        "field": "batches",
        "type": "quantitative",
        "axis": {"title": "trained batches", "format": "d", "tickMinStep": 1},
        "scale": {"nice": False, "padding": 4},
    }
    style = line_style("level", levels)
    y = value_axis("mean", domain=(0.0, 1.0))
    tooltip = [
        {"field": "level", "type": "nominal", "title": "level"},
        {"field": "batches", "type": "quantitative", "title": "trained batches"},
        *({"field": name, "type": "quantitative", "title": title, "format": ".4~g"} for name, title in _TOLD.items()),
    ]
    return {
        "data": {"name": _POINTS},
        "width": "container",
        "height": 260,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.12},
                "encoding": {"x": x, "y": {**value_axis("low", domain=(0.0, 1.0))}, "y2": {"field": "high"}, "color": style["color"]},
            },
            {"mark": {"type": "line"}, "encoding": {"x": x, "y": y, **style}},
            {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 0}, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
        ],
    }


_TOLD = {"mean": "mean over seeds", "low": "95 % from", "high": "to"}
