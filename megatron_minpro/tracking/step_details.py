"""What a step has besides numbers, for trackers that can show it: histograms and a few responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts of tokens, over all ranks and updates of a step."""

    edges: Sequence[float]  # ascending; bin i holds edges[i - 1] < x <= edges[i]
    counts: Sequence[float]  # one more than edges: the first and the last bin are open

    def filled(self) -> tuple[list[float], list[float]]:
        """Bounds and counts without the empty bins at both ends; one bound more than counts. An open bin ends at its one edge.

        Raises ValueError where no bin has a count.
        """
        filled = [index for index, count in enumerate(self.counts) if count]
        if not filled:
            raise ValueError("a histogram without any count has no bounds")
        bounds = [self.edges[0], *self.edges, self.edges[-1]]  # of bin i: i and i + 1
        first, last = filled[0], filled[-1]
        return bounds[first : last + 2], [float(count) for count in self.counts[first : last + 1]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDetails:
    """Of the batch that a step has trained."""

    # log_ratio, log_prefix_min, and of each share of the responses log_ratio_histogram/share_0_1, ...; empty where no token is
    histograms: Mapping[str, Histogram]
    responses: Sequence[Mapping[str, Any]]  # lines of rollouts/step_....jsonl, each of another prompt; none where no file is kept

    def filled_histograms(self) -> dict[str, Histogram]:
        """Those with some count."""
        return {name: histogram for name, histogram in self.histograms.items() if any(histogram.counts)}
