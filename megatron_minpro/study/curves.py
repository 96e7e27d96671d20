"""The curves of a study over trained batches: mean over seeds with its interval, smoothed. Pictures and page draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_minpro.report.moving_average import moving_average
from megatron_minpro.report.statistics import Interval, mean_interval
from megatron_minpro.study.rows import Row

CurveName = Literal["reward", "entropy", "clipped", "sample_size"]
# Name -> names of the rows' curves that are added, label.
CURVES: Mapping[CurveName, tuple[tuple[str, ...], str]] = {
    "reward": (("reward",), "mean reward of the trained batch"),
    "entropy": (("entropy",), "policy entropy per token (nats)"),
    "clipped": (("clip_hard", "clip_soft"), "share of clipped tokens"),
    "sample_size": (("sample_size",), "effective sample size of the weights"),
}
_SMOOTHED = 5  # points of the moving average, at most a fifth of the curve


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One curve, smoothed. low, high: bounds of the mean's 95 % t interval; those of a single seed are the mean."""

    batches: Sequence[int]  # trained so far, at each point
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @property
    def has_band(self) -> bool:
        """Whether there are several seeds."""
        return self.low != self.high


def smoothed_curve(rows: Sequence[Row], name: CurveName) -> Curve | None:
    """The curve of these rows, which differ in the seed alone. None where no row has it."""
    points = mean_curve(rows, CURVES[name][0])
    if not points:
        return None
    window = max(1, min(_SMOOTHED, len(points) // 5))
    mean = [point.mean for _, point in points]
    low = [point.mean if point.low is None else point.low for _, point in points]
    high = [point.mean if point.high is None else point.high for _, point in points]
    return Curve(
        batches=[batches for batches, _ in points],
        mean=moving_average(mean, window),
        low=moving_average(low, window),
        high=moving_average(high, window),
    )


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
