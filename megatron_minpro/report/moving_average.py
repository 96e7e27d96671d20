"""The average that smooths curves."""

from __future__ import annotations

from collections.abc import Sequence


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and up to window - 1 before it: same length, never looks ahead. Raises ValueError for a window below 1."""
    if window < 1:
        raise ValueError(f"moving average: window = {window}, expected at least 1")
    averages = []
    for index in range(len(values)):
        recent = values[max(0, index - window + 1) : index + 1]
        averages.append(sum(recent) / len(recent))
    return averages
