"""Metrics as columns, each number with six digits, of as many steps as the page takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_minpro.report.page.along_response import is_quantile_along
from megatron_minpro.report.page.charts.chart import ROOT_MEAN_SQUARE, STEP
from megatron_minpro.report.page.rounded import rounded
from megatron_minpro.report.page.token_budget import evenly

_FEWEST_STEPS = 20
_MEAN_SQUARE = "log_ratio/mean_square"


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """metric -> its value at each step, None where the step has none."""

    values: Mapping[str, Sequence[float | None]]
    note: str | None  # that steps are left out


def columns(metrics: Sequence[Mapping[str, float | None]], *, numbers: int) -> Columns:
    """All metrics of the run but the quantiles along the response, and the root of log_ratio/mean_square.

    Args:
        metrics: lines of metrics.jsonl.
        numbers: how many the page takes; then steps are chosen evenly, the first and the last among them.
    """
    names = list(
        dict.fromkeys(name for line in metrics for name, value in line.items() if value is not None and not is_quantile_along(name))
    )
    most = max(_FEWEST_STEPS, numbers // max(1, len(names)))
    lines = evenly(metrics, most)
    values = {name: [rounded(line.get(name)) for line in lines] for name in names}
    if _MEAN_SQUARE in values:
        values[ROOT_MEAN_SQUARE] = [None if square is None else rounded(math.sqrt(max(0.0, square))) for square in values[_MEAN_SQUARE]]
    values.setdefault(STEP, [])
    note = f"curves show {len(lines):,} of {len(metrics):,} steps, evenly chosen" if len(lines) < len(metrics) else None
    return Columns(values=values, note=note)
